# SPDX-License-Identifier: Apache-2.0
"""What makes a Sam hard to quantize, in figures: the four panels of figure 1 of the AHCQ-SAM paper.

(a) condition numbers of weights, (b) post-GELU activations, (c) ranges of single channels at the inputs of Query, Key
and Value projections and of the first Linear of an MLP, (d) post-softmax scores.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ahcq_plugin.ptq.prepared import watched
from ahcq_plugin.studies.tensors import channel_ranges, sample
from ahcq_plugin.zoo.items import Item
from ahcq_plugin.zoo.predict import predict_masks

SAMPLES = 100_000  # values kept of each tensor
PERCENTILES = (1, 10, 50, 90, 99, 99.9)


def channel_kind(name: str) -> str | None:
    """The paper's name for the Linear whose input channels are compared, None for the others."""
    if name.endswith("attn.qkv"):
        return "encoder Query/Key/Value"
    if name.endswith("mlp.lin1"):
        return ("encoder" if name.startswith("image_encoder") else "decoder") + " Linear-1"
    parts = name.split(".")
    if parts[-1] in ("q_proj", "k_proj", "v_proj"):
        return f"{attention_kind('.'.join(parts[:-1]))} {parts[-1][0].upper()}"
    return None


def attention_kind(name: str) -> str:
    """Which sort of attention a module of a Sam computes."""
    if name.startswith("image_encoder"):
        return "encoder"
    for mark, kind in (("image_to_token", "image-to-token"), ("token_to_image", "token-to-image")):
        if mark in name:
            return kind
    return "decoder self"


class _Softmaxes(TorchFunctionMode):
    """Within the context, keeps a sample of every softmax under the name of the attention module that is running."""

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.kept: dict[str, list[Tensor]] = {}
        self.running: list[str] = []
        self.hooks = []
        for name, module in sam.named_modules():
            if type(module).__name__ == "Attention":
                self.hooks += [
                    module.register_forward_pre_hook(lambda m, x, name=name: self.running.append(name)),
                    module.register_forward_hook(lambda m, x, y: self.running.pop() and None),
                ]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.running and func in (torch.softmax, Tensor.softmax, nn.functional.softmax):
            self.kept.setdefault(self.running[-1], []).append(sample(result, SAMPLES // 16))
        return result

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)


def activation_statistics(sam: Sam, items: Iterable[Item]) -> dict[str, dict[str, dict[str, float]]]:
    """Post-GELU and post-softmax percentiles and channel ranges over ``items``, per module (softmax and GELU) or per
    layer (channels): ``{"gelu": …, "softmax": …, "channels": …}``."""
    named = dict(sam.named_modules())
    gelus = {n: m for n, m in named.items() if isinstance(m, nn.GELU) and not n.startswith("prompt_encoder")}
    layers = {n: m for n, m in named.items() if isinstance(m, nn.Linear) and channel_kind(n)}
    samples: dict[str, list[Tensor]] = {}
    ranges: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, x: Tensor, out: Tensor) -> None:
        samples.setdefault(name, []).append(sample(out, SAMPLES // 16))

    def widen(name: str, _: nn.Module, x: Tensor, out: Tensor) -> None:
        low, high = channel_ranges(x)
        if name in ranges:
            low, high = torch.minimum(ranges[name][0], low), torch.maximum(ranges[name][1], high)
        ranges[name] = torch.stack([low, high])

    with _Softmaxes(sam) as softmaxes, watched(gelus, keep), watched(layers, widen):
        for item in items:
            predict_masks(sam, item.image, item.boxes)
    gelu = {}
    for name, parts in samples.items():
        x = torch.cat(parts).double().numpy()
        centred = x - x.mean()
        gelu[name] = {
            **_percentiles(x),
            "min": float(x.min()),
            "max": float(x.max()),
            "share in [-0.2, 0]": float(((x >= -0.2) & (x <= 0)).mean()),
            "skewness": float((centred**3).mean() / (centred**2).mean() ** 1.5),
        }
    softmax = {}
    for name, parts in softmaxes.kept.items():
        x = torch.cat(parts).double().numpy()
        softmax[name] = {
            **_percentiles(x),
            "min": float(x.min()),
            "max": float(x.max()),
            "share below 1/255": float((x < 1 / 255).mean()),
            "share below 2^-15": float((x < 2.0**-15).mean()),
        }
    channels = {}
    for name, (low, high) in ranges.items():
        width = (high - low).double().numpy()
        channels[name] = {
            "min": float(width.min()),
            "median": float(np.median(width)),
            "max": float(width.max()),
            "max/median": float(width.max() / max(np.median(width), 1e-12)),
            "max/min": float(width.max() / max(width.min(), 1e-12)),
        }
    return {"gelu": gelu, "softmax": softmax, "channels": channels}


def _percentiles(x: np.ndarray) -> dict[str, float]:
    return {f"p{p}": float(v) for p, v in zip(PERCENTILES, np.percentile(x, PERCENTILES), strict=True)}
