# SPDX-License-Identifier: Apache-2.0
"""Operands of attention with a scale and a zero point for each head.

A quantizer has them along one axis of its tensor, whose heads a matmul may see elsewhere: what is known of the tensor's
place is carried along as labels, small integers in the shape of the codes, through whatever moves the codes about.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ahcq_plugin.export.matmul import Unsupported
from ahcq_plugin.export.operands import Activation, PerHeadOperand, UniformOperand
from ahcq_plugin.functional.uniform import UniformParams
from ahcq_plugin.integer.encoder import Encoder
from ahcq_plugin.integer.forms import Forms
from ahcq_plugin.integer.products import IntegerProduct
from ahcq_plugin.quantizers.head_axis import HeadAxis


class PerHeadEncoder(Encoder):
    """Uniform codes with a grid for each head, or for each index of an axis.

    Args:
        operand: scale and zero point of each.
        place: where the heads lie; a number is an axis that has as many indices as there are grids.

    Attributes:
        labels: int64 (grids,): equal where the grids are.
    """

    def __init__(self, operand: PerHeadOperand, place: HeadAxis | int, name: str = ""):
        super().__init__(operand, None, name)
        self._place = place
        self.scale = torch.from_numpy(operand.scales.copy())
        self.zero_point = torch.from_numpy(operand.zero_points.astype(np.float32))
        grids = np.stack([operand.scales.astype(np.float64), operand.zero_points], 1)
        self.register_buffer("labels", torch.from_numpy(np.unique(grids, axis=0, return_inverse=True)[1].reshape(-1)))

    @torch.compiler.disable
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """uint8 codes of x, or of its sum with ``other``."""
        x = (x if other is None else x + other).float()
        place = self.place(x.ndim)
        grids = place.shaped(UniformParams(self.scale, self.zero_point))
        codes = torch.round(place.split(x) / grids.scale).add_(grids.zero_point).clamp_(0, self.top)
        return codes.to(torch.uint8).reshape(x.shape)

    def place(self, ndim: int) -> HeadAxis:
        """Where the heads lie in a tensor of so many dimensions."""
        if isinstance(self._place, HeadAxis):
            return self._place
        return HeadAxis(ndim - self._place, self.scale.numel())

    def labels_of(self, codes: Tensor) -> Tensor:
        """int64 in the shape of the codes; a view where the grids' axis is one of the tensor's."""
        place = self.place(codes.ndim)
        return self.labels.view(-1, *[1] * place.from_end).expand(place.split(codes).shape).reshape(codes.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 values of the codes, bit-equal to the fake quantizer's."""
        place = self.place(codes.ndim)
        grids = place.shaped(UniformParams(self.scale, self.zero_point))
        return ((place.split(codes).float() - grids.zero_point) * grids.scale).reshape(codes.shape)

    def operand(self) -> PerHeadOperand:
        """The different grids, one for each label."""
        first = [int((self.labels == label).nonzero()[0]) for label in range(int(self.labels.max()) + 1)]
        return PerHeadOperand(
            self.bits, self.scale[first].cpu().numpy(), self.zero_point[first].cpu().numpy().astype(np.int64)
        )


class HeadLabels(nn.Module):
    """Labels in the shape of codes."""

    def __init__(self, encoder: PerHeadEncoder):
        super().__init__()
        self._encoder = (encoder,)  # in a tuple: it has its own place in the unit

    @torch.compiler.disable
    def forward(self, codes: Tensor) -> Tensor:
        return self._encoder[0].labels_of(codes)


class PerHeadProduct(Forms):
    """A product of activations whose grids differ from head to head; ``IntegerProduct`` of one choice of them each.

    Args:
        left, right: operands; of one that is per head the grids by label.
    """

    def __init__(self, left: Activation, right: UniformOperand | PerHeadOperand):
        super().__init__()
        self._operands = left, right
        self.register_buffer("_place", torch.zeros(0), persistent=False)  # of the device

    @torch.compiler.disable
    def forward(
        self, left: Tensor, right: Tensor, left_labels: Tensor | None = None, right_labels: Tensor | None = None
    ) -> Tensor:
        """float32 (..., m, n) of uint8 codes (..., m, k) and (..., k, n), with labels in their shapes.

        Raises:
            Unsupported: grids differ within a product.
        """
        labels = tuple(map(_of_products, (left_labels, right_labels)))
        return self.form(labels, lambda: self._chosen(labels).to(self._place.device))(left, right)

    def _chosen(self, labels: tuple[tuple[int, ...] | None, ...]) -> IntegerProduct:
        left, right = self._operands
        if isinstance(left, PerHeadOperand):
            left = _by_labels(left, labels[0])
        return IntegerProduct(left, _by_labels(right, labels[1]) if isinstance(right, PerHeadOperand) else right)


def _by_labels(grids: PerHeadOperand, labels: tuple[int, ...] | None) -> PerHeadOperand:
    """The grid of each product; of none the first."""
    chosen = list(labels or (0,))
    return PerHeadOperand(grids.bits, grids.scales[chosen], grids.zero_points[chosen])


def _of_products(labels: Tensor | None) -> tuple[int, ...] | None:
    """The label of each product; None where there are none."""
    if labels is None or not labels.numel():
        return None
    first = labels[..., :1, :1]
    if not bool((labels == first).all()):
        raise Unsupported("scale or zero point of a product of activations differ within a head")
    return tuple(first.reshape(-1).tolist())
