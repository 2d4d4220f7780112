# SPDX-License-Identifier: Apache-2.0
"""What a family of models is here: a cut-down model of its real classes, a few inputs, and how to run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ahcq_plugin.support.batches import default_forward

#: Below this a random parameter says nothing: Hugging Face starts position tables at 1e-10, layer scales are 1e-5.
_SAYS_NOTHING = 1e-3
#: Inputs of a case: two are too few for ranges of small maps.
ITEMS = 4


@dataclass(frozen=True)
class Case:
    """A model, calibration items, ``forward(model, item)``, and what of it may stay in floating point."""

    model: nn.Module
    items: list[Any]
    forward: Callable[[nn.Module, Any], Any] = default_forward
    leave: Sequence[str] = ()


@dataclass(frozen=True)
class Family:
    """A row of docs/models.md.

    Attributes:
        name: of the model.
        source: the package or repository of the classes.
        build: makes the case; ImportError says that the source is not installed.
    """

    name: str
    source: str
    build: Callable[[], Case]

    def case(self) -> Case:
        """The same model and items every time: seeded weights that all say something."""
        torch.manual_seed(0)
        case = self.build()
        _stir(case.model)
        _settle_batch_norms(case)
        case.model.eval()
        return case


def tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of all tensors in nested dicts, dataclasses, tuples and lists."""
    if isinstance(value, Tensor):
        yield "", value
        return
    if is_dataclass(value) and not isinstance(value, Mapping):
        value = {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, tuple | list):
        value = dict(enumerate(value))
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        for path, tensor in tensors(inner):
            yield f"{key}.{path}".rstrip("."), tensor


def relative_error(got: Any, expected: Any) -> float:
    """Largest ||got - expected|| / ||expected|| of the floating-point tensors in two outputs of one structure."""
    pairs = list(zip(tensors(got), tensors(expected), strict=True))
    errors = [
        float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))
        for (_, a), (_, b) in pairs
        if b.is_floating_point() and b.numel()
    ]
    if not errors:
        raise ValueError("no floating-point tensor in the outputs: nothing to compare")
    return max(errors)


def pooled_error(got: Sequence[Any], expected: Sequence[Any]) -> float:
    """As ``relative_error``, for each tensor of the outputs over all items at once: a few numbers of one item (the
    predicted IoU of a mask) may happen to lie next to zero."""
    squares: dict[str, list[float]] = {}
    for one, other in zip(got, expected, strict=True):
        for (path, a), (_, b) in zip(tensors(one), tensors(other), strict=True):
            if b.is_floating_point() and b.numel():
                sums = squares.setdefault(path, [0.0, 0.0])
                sums[0] += float((a.double() - b.double()).square().sum())
                sums[1] += float(b.double().square().sum())
    if not squares:
        raise ValueError("no floating-point tensor in the outputs: nothing to compare")
    return max((error / max(size, 1e-24)) ** 0.5 for error, size in squares.values())


def equal(got: Any, expected: Any) -> bool:
    """Whether two outputs have the same structure and the same bits."""
    pairs = zip(tensors(got), tensors(expected), strict=True)
    return all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


def image(side: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Smooth noise (batch, 3, side, side), about standard normal: neighbouring pixels resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, max(side // 8, 2), max(side // 8, 2), generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return smooth + 0.1 * torch.randn(smooth.shape, generator=generator)


def boxes(side: int) -> Tensor:
    """Two boxes (2, 4) xyxy in a square image."""
    return torch.tensor([[0.1, 0.2, 0.6, 0.7], [0.3, 0.1, 0.9, 0.5]]) * side


def points(side: int) -> tuple[Tensor, Tensor]:
    """One click for each of two objects: (2, 1, 2) in pixels and labels (2, 1)."""
    return torch.tensor([[[0.3, 0.4]], [[0.6, 0.7]]]) * side, torch.ones(2, 1, dtype=torch.int64)


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    """Noise on parameters that are constant or next to nothing (norms, layer scales, position tables), and layers that
    keep the size of what passes: published initial weights are those of wide models."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter.numel() < 2 or parameter.std() < _SAYS_NOTHING):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    for layer in model.modules():
        if isinstance(layer, nn.Embedding):  # tokens next to nothing are all the same but for rounding
            layer.weight *= max(1.0, 1.0 / float(layer.weight.std()))
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            gain = float(layer.weight.std()) * layer.weight[0].numel() ** 0.5
            layer.weight *= max(1.0, 1.0 / gain)


@torch.no_grad()
def _settle_batch_norms(case: Case) -> None:
    """Running statistics of all items: an untrained batch norm lets values die out or explode."""
    norms = [m for m in case.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    case.model.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    for item in case.items:
        case.forward(case.model, item)
