# SPDX-License-Identifier: Apache-2.0
"""Frame of the families that are sorted tables: HLUQ, LNQ, AGQ and powers of two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ahcq_plugin.functional import tables
from ahcq_plugin.functional.dropping import Drop
from ahcq_plugin.functional.tables import Table, check_table_bits
from ahcq_plugin.quantizers.base import FakeQuantize
from ahcq_plugin.quantizers.observers import OutputErrorObserver
from ahcq_plugin.quantizers.search import OutputErrorSearch


class TableFakeQuantize(OutputErrorSearch, FakeQuantize):
    """Quantizes by a table per tensor, whose parameters are searched. A subclass implements ``tensors`` besides.

    Raises:
        ValueError: ``ch_axis`` other than -1, or bits that the family does not offer.
        TypeError: an observer that is not an ``OutputErrorObserver``.
    """

    def __init__(
        self, observer=OutputErrorObserver, quant_min=0, quant_max=255, ch_axis=-1, role="", **observer_kwargs
    ):
        super().__init__(observer, quant_min, quant_max, ch_axis, role, **observer_kwargs)
        self.check_bits()
        self.check_tensor_wide()
        if not isinstance(self.activation_post_process, OutputErrorObserver):
            name = type(self.activation_post_process).__name__
            raise TypeError(f"the family {self.family} needs an OutputErrorObserver, got {name}")

    def check_bits(self) -> None:
        """ValueError unless the family offers ``self.bits``."""
        check_table_bits(self.bits)

    #: The class of parameters in ``functional``, of the tensors in this order.
    params_type: Any

    def __init_subclass__(cls) -> None:
        _FAMILIES[cls.family] = cls

    def tensors(self) -> list[Tensor]:
        """All that the table is computed from, but the bits."""
        raise NotImplementedError

    def params(self) -> Any:
        """Current parameters, for the functions of ``functional``."""
        return self.params_type(*self.tensors())

    @classmethod
    def table_of(cls, tensors: list[Tensor], bits: int) -> Table:
        """The table of what ``tensors`` gives."""
        return cls.functional.table(cls.params_type(*tensors), bits)

    def table(self) -> Table:
        """What it computes with its current parameters: boundaries, levels and codes, all that hardware needs."""
        return self.table_of(self.tensors(), self.bits)

    def quantize_compiled(self, x: Tensor) -> Tensor:
        return quantize_by_table(x, self.family, self.tensors(), self.bits)

    def encode(self, x: Tensor) -> Tensor:
        return tables.encode(x, self.table())

    def decode(self, codes: Tensor) -> Tensor:
        return tables.decode(codes, self.table())

    def quantize(self, x: Tensor, drop: Drop | None = None) -> Tensor:
        grad_factor = (max(x.numel(), 1) * self.quant_max) ** -0.5
        return self.functional.fake_quantize(x, self.params(), self.bits, grad_factor, drop)

    def calculate_qparams(self):
        return self.scale, torch.zeros_like(self.scale, dtype=torch.int32)


_FAMILIES: dict[str, type[TableFakeQuantize]] = {}


@torch.library.custom_op(
    "ahcq_plugin::quantize_by_table",
    mutates_args=(),
    schema="(Tensor x, str family, Tensor[] tensors, int bits) -> Tensor",
)
def quantize_by_table(x: Tensor, family: str, tensors: list[Tensor], bits: int) -> Tensor:
    """``decode(encode(x))`` in x's dtype as one operator that ``torch.compile`` and ``torch.export`` do not look into:
    compiled, the tables' float64 arithmetic need not give the same bits."""
    table = _FAMILIES[family].table_of(tensors, bits)
    return tables.decode(tables.encode(x, table), table).to(x.dtype)


@quantize_by_table.register_fake
def _(x: Tensor, family: str, tensors: list[Tensor], bits: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
