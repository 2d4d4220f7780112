# SPDX-License-Identifier: Apache-2.0
"""The table of roles: which tensor of which unit plays which role, what quantizes it, and how many weights are left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx, nn
from torch.ao.quantization import FakeQuantizeBase

from ahcq_plugin.graph.placement import placements
from ahcq_plugin.graph.roles import find_roles, find_weight_layers
from ahcq_plugin.graph.unit import trace_unit
from ahcq_plugin.graph.units import UnitSpec, find_units, prepared_units

NO_QUANTIZER = "-"
WEIGHT_ROLE = "weight"
_MOST = 5  # parts outside of units that are named
_HEADER = ("unit", "tensor", "role", "quantizer")


@dataclass(frozen=True)
class RoleRow:
    """One tensor: graph node or weight name, role, the layers that read it (none for q, k, v, softmax), quantizer."""

    unit: str
    node: str
    role: str
    layers: tuple[str, ...]
    quantizer: str

    @property
    def tensor(self) -> str:
        """The node, and where it goes if to layers: ``norm2 -> mlp.lin1``."""
        return f"{self.node} -> {', '.join(self.layers)}" if self.layers else self.node


@dataclass(frozen=True)
class RoleTable:
    """Rows in unit and graph order, the weights of a unit last; ``str()`` is an aligned table and the share of weights.

    Attributes:
        quantized, in_units: elements of the weights of Linear and Conv2d layers with the role ``weight``, and of all
            other parameters in units.
        outside: module -> elements of its own parameters, of those outside of units, largest first.
    """

    rows: tuple[RoleRow, ...]
    quantized: int = 0
    in_units: int = 0
    outside: tuple[tuple[str, int], ...] = ()

    def __iter__(self) -> Iterator[RoleRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        cells = [_HEADER, *((row.unit, row.tensor, row.role, row.quantizer) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [" | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join([lines[0], "-+-".join("-" * w for w in widths), *lines[1:], *self._shares()])

    def _shares(self) -> list[str]:
        outside = sum(count for _, count in self.outside)
        total = self.quantized + self.in_units + outside
        if not total:
            return []
        names = [name for name, _ in self.outside]
        more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
        named = f" ({', '.join(names[:_MOST])}{more})" if names else ""
        shares = (f"{count / total:.2%}" for count in (self.quantized, self.in_units, outside))
        return ["of the weights {} are quantized, {} in floating point in units, {} outside".format(*shares) + named]


def describe(model: nn.Module, units: UnitSpec | Iterable[UnitSpec] | None = None) -> RoleTable:
    """Tabulate the roles of a model, which is left untouched.

    Args:
        model: prepared or not. An unprepared model shows the sites that ``prepare`` would quantize, with quantizer '-'.
        units: as for ``find_units``; None: the prepared units, or those found by structure.
    Raises:
        ValueError, RuntimeError: as ``find_units``, ``trace_unit`` and ``find_roles``.
    """
    prepared = prepared_units(model)
    names = list(prepared) if units is None and prepared else find_units(model, units)
    rows: list[RoleRow] = []
    traced = {n: prepared[n] if n in prepared else trace_unit(model.get_submodule(n), n) for n in names}
    for name, unit in traced.items():
        rows += (_prepared_rows if name in prepared else _planned_rows)(name, unit)
    return RoleTable(tuple(rows), *_count(model, traced))


def _count(model: nn.Module, units: Mapping[str, fx.GraphModule]) -> tuple[int, int, tuple[tuple[str, int], ...]]:
    """See ``RoleTable``; the parameters of quantizers are no weights of the model."""
    quantized, inside, sizes = 0, set(), {}
    for unit in units.values():
        layers = [unit.get_submodule(name) for name in find_weight_layers(unit)]
        quantized += sum(layer.weight.numel() for layer in layers)
        for module in unit.modules():
            own = dict(module.named_parameters(recurse=False)).values()
            inside.update(map(id, own))
            if not isinstance(module, FakeQuantizeBase):
                sizes.update((id(parameter), parameter.numel()) for parameter in own)
    outside = {
        name: sum(p.numel() for p in module.parameters(recurse=False) if id(p) not in inside)
        for name, module in model.named_modules()
    }
    rest = sorted(((name or "the model itself", count) for name, count in outside.items() if count), key=_largest)
    return quantized, sum(sizes.values()) - quantized, tuple(rest)


def _largest(part: tuple[str, int]) -> tuple[int, str]:
    return -part[1], part[0]


def _planned_rows(unit: str, gm: fx.GraphModule) -> list[RoleRow]:
    rows = [RoleRow(unit, site.node.name, site.role, site.layers, NO_QUANTIZER) for site in find_roles(gm)]
    return rows + [RoleRow(unit, f"{layer}.weight", WEIGHT_ROLE, (), NO_QUANTIZER) for layer in find_weight_layers(gm)]


def _prepared_rows(unit: str, gm: fx.GraphModule) -> list[RoleRow]:
    rows = [RoleRow(unit, p.node, p.role, p.layers, _text(gm.get_submodule(p.quantizer_name))) for p in placements(gm)]
    for layer in find_weight_layers(gm):
        quantizer = getattr(gm.get_submodule(layer), "weight_fake_quant", None)
        rows.append(RoleRow(unit, f"{layer}.weight", WEIGHT_ROLE, (), _text(quantizer)))
    return rows


def _text(quantizer: nn.Module | None) -> str:
    if quantizer is None:
        return NO_QUANTIZER
    bits = getattr(quantizer, "bits", None)
    text = type(quantizer).__name__ + (f" {bits} bit" if bits is not None else "")
    if getattr(quantizer, "per_head", False):
        return text + ", per head"
    return text + (", per channel" if getattr(quantizer, "ch_axis", -1) != -1 else "")
