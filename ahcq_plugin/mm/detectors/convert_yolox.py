# SPDX-License-Identifier: Apache-2.0
"""YOLOX from ONNX (batch norm folded into the convolutions, as YOLOX's export script leaves it) to an mmdet state dict.

The exported graph has lost the module names of the folded convolutions, so they are matched by their order in the
graph. That order is the order of execution in the original YOLOX code; :func:`conv_names` spells it in mmdet's names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ahcq_plugin.support.batches import blaming
from ahcq_plugin.support.checked import save_checked

NANO_CONFIG = "yolox/yolox_nano_8xb8-300e_coco.py"


def build_yolox(config: str = NANO_CONFIG) -> nn.Module:
    """An mmdet YOLOX with random weights from a config packaged in mmdet's wheel (path below its ``configs``)."""
    from mmdet.utils import register_all_modules

    from ahcq_plugin.mm.detectors.official import built

    register_all_modules(init_default_scope=True)
    return built(_packaged(config), "YOLOX")


def conv_names(model: nn.Module) -> list[str]:
    """Names of all convolutions of an mmdet YOLOX in the order of execution of the original YOLOX code.

    Backbone; neck: lateral and down-sampling convolutions before the block that they feed; then for each level the
    stem of the head (``neck.out_convs`` in mmdet), classification branch and its output, regression branch and its
    two outputs.
    """
    names = list(_within(model.backbone, "backbone"))
    neck, head = model.neck, model.bbox_head
    for i in range(len(neck.reduce_layers)):
        names += _within(neck.reduce_layers[i], f"neck.reduce_layers.{i}")
        names += _within(neck.top_down_blocks[i], f"neck.top_down_blocks.{i}")
    for i in range(len(neck.downsamples)):
        names += _within(neck.downsamples[i], f"neck.downsamples.{i}")
        names += _within(neck.bottom_up_blocks[i], f"neck.bottom_up_blocks.{i}")
    for i in range(len(neck.out_convs)):
        names += _within(neck.out_convs[i], f"neck.out_convs.{i}")
        for part in ("cls_convs", "conv_cls", "reg_convs", "conv_reg", "conv_obj"):
            names += _within(getattr(head, f"multi_level_{part}")[i], f"bbox_head.multi_level_{part}.{i}")
    return names


def convert_state_dict(convs: list[tuple[Tensor, Tensor]], model: nn.Module) -> dict[str, Tensor]:
    """mmdet state dict from folded convolutions.

    A folded convolution has a bias, mmdet's has none but a batch norm behind it: the batch norm becomes an identity
    with that bias (mean 0, variance 1, weight sqrt(1 + eps)), so outputs agree up to float32 rounding.

    Args:
        convs: (weight (out, in / groups, k, k), bias (out,)) of each convolution in graph order.
        model: mmdet YOLOX of the same size; only its names and shapes are used.

    Raises:
        ValueError: another number of convolutions or another shape than the model's.
    """
    names = conv_names(model)
    if len(names) != len(convs):
        raise ValueError(
            f"the ONNX graph has {len(convs)} convolutions, the mmdet model {len(names)}: another YOLOX size?"
        )
    modules, state = dict(model.named_modules()), model.state_dict()
    for name, (weight, bias) in zip(names, convs, strict=True):
        conv = modules[name]
        if conv.weight.shape != weight.shape or len(bias) != len(weight):
            raise ValueError(
                f"{name}: the ONNX weight has shape {tuple(weight.shape)}, the mmdet model {tuple(conv.weight.shape)}: "
                "another YOLOX size?"
            )
        state[f"{name}.weight"] = weight
        if conv.bias is not None:
            state[f"{name}.bias"] = bias
            continue
        norm = name.removesuffix("conv") + "bn"
        state[f"{norm}.weight"] = torch.full_like(bias, (1.0 + modules[norm].eps) ** 0.5)
        state[f"{norm}.bias"] = bias
        state[f"{norm}.running_mean"] = torch.zeros_like(bias)
        state[f"{norm}.running_var"] = torch.ones_like(bias)
    return state


def read_convs(onnx_path: str | Path) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of each ``Conv`` node in graph order, float32.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an ONNX file, or a convolution without bias (batch norm not folded).
    """
    import onnx
    from google.protobuf.message import DecodeError

    path = Path(onnx_path)
    if not path.is_file():
        raise FileNotFoundError(f"no ONNX file {path}")
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except DecodeError as error:
        raise ValueError(f"{path} is not an ONNX file ({error})") from error
    tensors = {t.name: t for t in graph.initializer}
    if elsewhere := [t.name for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]:
        raise ValueError(f"{path}: {elsewhere[0]} lies in another file; save the model with its weights inside")
    convs = []
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        if len(node.input) != 3:
            raise ValueError(
                f"{path}: {node.name} has no bias; export with batch norm folded (the default of YOLOX's export)"
            )
        with blaming(f"{path}: the weights of {node.name or 'a convolution'} cannot be read"):
            weight, bias = (_finite(onnx.numpy_helper.to_array(tensors[i])) for i in node.input[1:])
            convs.append((weight, bias))
    return convs


def _finite(values: np.ndarray) -> Tensor:
    if values.dtype != np.float32 or not np.isfinite(values).all():
        raise ValueError(f"they must be finite float32 numbers, got {values.dtype}")
    return torch.from_numpy(values.copy())


def convert_yolox(onnx_path: str | Path, out_path: str | Path, config: str = NANO_CONFIG) -> int:
    """Write ``out_path``, a checkpoint for mmdet's ``config``; loaded strictly once as a check.

    Returns: number of converted convolutions.
    """
    model = build_yolox(config)
    convs = read_convs(onnx_path)
    state = convert_state_dict(convs, model)
    model.load_state_dict(state, strict=True)
    save_checked({"state_dict": state, "meta": {"source": Path(onnx_path).name, "config": config}}, out_path)
    return len(convs)


def _within(module: nn.Module, prefix: str) -> Iterator[str]:
    """Convolutions of a module in execution order; only CSP layers register theirs in another order."""
    if isinstance(module, nn.Conv2d):
        yield prefix
        return
    children = dict(module.named_children())
    if {"main_conv", "short_conv", "blocks", "final_conv"} <= children.keys():
        children = {k: children[k] for k in ("main_conv", "short_conv", "blocks", "final_conv")}
    for name, child in children.items():
        yield from _within(child, f"{prefix}.{name}")


def _packaged(config: str) -> Path:
    import mmdet

    return Path(mmdet.__file__).parent / ".mim" / "configs" / config
