# SPDX-License-Identifier: Apache-2.0
"""Where the heads of attention lie in a tensor, for parameters that differ from head to head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ahcq_plugin.functional.uniform import UniformParams


@dataclass(frozen=True)
class HeadAxis:
    """Index i of an axis belongs to head ``(i // inner) % count``.

    In SAM's decoder heads share the last axis with their channels (``inner`` channels each), in its encoder the first
    one with windows, heads innermost (``inner`` 1).

    Attributes:
        from_end: the axis, counted from the end, 1 for the last.
        count: heads; 1: the tensor has one set of parameters.
        inner: consecutive indices of one head.
    """

    from_end: int = 1
    count: int = 1
    inner: int = 1

    def split(self, x: Tensor) -> Tensor:
        """x with the axis as (rest, heads, inner): a view that ``shaped`` parameters broadcast against.

        Raises:
            ValueError: the axis cannot be shared out to the heads.
        """
        size = x.shape[-self.from_end]
        if size % (self.count * self.inner):
            raise ValueError(
                f"an axis of {size} cannot hold {self.count} heads of {self.inner}: the tensor's shape is not the one "
                "that was calibrated"
            )
        return x.unflatten(-self.from_end, (size // (self.count * self.inner), self.count, self.inner))

    def shaped(self, params: UniformParams) -> UniformParams:
        """(heads,) parameters as the split tensor needs them."""
        parts = (part.view(-1, *[1] * self.from_end) for part in (params.scale, params.zero_point))
        return UniformParams(*parts)

    def rows(self, x: Tensor) -> Tensor:
        """(heads, values) of a tensor that is not empty."""
        return self.split(x).movedim(-self.from_end - 1, 0).flatten(1)
