# SPDX-License-Identifier: Apache-2.0
"""The table of roles: which tensor of which unit plays which role, and what quantizes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx, nn

from ahcq_plugin.graph.placement import placements
from ahcq_plugin.graph.roles import find_roles, find_weight_layers
from ahcq_plugin.graph.unit import trace_unit
from ahcq_plugin.graph.units import UnitSpec, find_units, prepared_units

NO_QUANTIZER = "-"
WEIGHT_ROLE = "weight"
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
    """Rows in unit and graph order, the weights of a unit last; ``str()`` is an aligned table."""

    rows: tuple[RoleRow, ...]

    def __iter__(self) -> Iterator[RoleRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        cells = [_HEADER, *((row.unit, row.tensor, row.role, row.quantizer) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [" | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join([lines[0], "-+-".join("-" * w for w in widths), *lines[1:]])


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
    for name in names:
        if name in prepared:
            rows += _prepared_rows(name, prepared[name])
        else:
            rows += _planned_rows(name, trace_unit(model.get_submodule(name), name))
    return RoleTable(tuple(rows))


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
    return text + (", per channel" if getattr(quantizer, "ch_axis", -1) != -1 else "")
