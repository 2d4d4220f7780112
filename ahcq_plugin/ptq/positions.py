# SPDX-License-Identifier: Apache-2.0
"""Products with tables of relative positions as layers, so that they are quantized (``Recipe.quantize_positions``)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn

from ahcq_plugin.graph import UncoveredError
from ahcq_plugin.graph.allowed import Uncovered, is_left, listed, node_name, source_line
from ahcq_plugin.graph.ops import GraphIndex, function_name
from ahcq_plugin.graph.positions import DECOMPOSED, RELATIVE_POSITIONS, exception_of
from ahcq_plugin.graph.relative_positions import add_relative_positions
from ahcq_plugin.quantizers.layers import LinearView

_SUFFIX = "_layer"


def layer_positions(units: Mapping[str, fx.GraphModule]) -> list[str]:
    """Let a Linear multiply queries with each table of relative positions, in place; the tables keep their names.

    The units' outputs stay the same up to the order of sums.

    Args:
        units: traced, without quantizers.
    Returns:
        Names of the layers, ``<unit>.<module>.rel_pos_h_layer``.
    Raises:
        UncoveredError: relative positions by another way than ``add_decomposed_rel_pos``, which would stay in floating
            point.
        ValueError: there are none in ``units``.
    """
    names, problems = [], []
    for unit_name, unit in units.items():
        index = GraphIndex(unit, unit.graph)
        for node in list(unit.graph.nodes):
            if exception_of(index, node) != RELATIVE_POSITIONS or is_left(unit, node):
                continue
            if _can_be_layers(unit, node):
                names += [f"{unit_name}.{layer}" for layer in _replace(unit, node)]
            else:
                problems.append(Uncovered(f"{unit_name}.{node_name(node)}", "relative positions", source_line(node)))
        unit.graph.lint()
        unit.recompile()
    if problems:
        raise UncoveredError(
            f"recipe: `quantize_positions` can quantize what `{DECOMPOSED}` of SAM's image encoder computes, but not "
            f"{listed(problems)}: name them in `leave=`, or set it to False"
        )
    if not names:
        raise ValueError(
            f"recipe: `quantize_positions` is True, and none of the {len(units)} units multiplies queries with tables "
            "of relative positions (rotary positions, and tables that are only added, stay in floating point): set it "
            "to False"
        )
    return list(dict.fromkeys(names))


def _can_be_layers(unit: fx.GraphModule, node: fx.Node) -> bool:
    if function_name(node) != DECOMPOSED or len(node.args) != 6 or node.kwargs:
        return False
    tables = [n for n in node.args[2:4] if isinstance(n, fx.Node) and n.op == "get_attr"]
    values = [operator.attrgetter(str(table.target))(unit) for table in tables]
    return (
        len(values) == 2 and all(isinstance(v, nn.Parameter) and v.ndim == 2 for v in values) and _agrees(node.target)
    )


@torch.no_grad()
def _agrees(function: Callable[..., Tensor]) -> bool:
    """Whether a model's own ``add_decomposed_rel_pos`` computes what ours does, tried on small tensors: also with a
    table that is interpolated, and with fewer keys than queries."""
    made = torch.Generator().manual_seed(0)
    for q_size, k_size, lengths in (((2, 3), (2, 3), (3, 5)), ((2, 3), (2, 3), (7, 3)), ((4, 2), (2, 2), (7, 3))):
        queries, keys = q_size[0] * q_size[1], k_size[0] * k_size[1]
        shapes = ((2, queries, keys), (2, queries, 4), (lengths[0], 4), (lengths[1], 4))
        scores, q, high, wide = (torch.randn(*shape, generator=made) for shape in shapes)
        try:
            wanted = function(scores, q, high, wide, q_size, k_size)
        except (TypeError, RuntimeError, ValueError):
            return False
        got = add_relative_positions(scores, q @ high.T, q @ wide.T, q_size, k_size)
        if got.shape != wanted.shape or not torch.allclose(got, wanted, rtol=1e-4, atol=1e-5):
            return False
    return True


def _replace(unit: fx.GraphModule, node: fx.Node) -> list[str]:
    scores, q, *tables, q_size, k_size = node.args
    names = [_layer(unit, str(table.target)) for table in tables]
    with unit.graph.inserting_before(node):
        products = [unit.graph.call_module(name, (q,)) for name in names]
        new = unit.graph.call_function(add_relative_positions, (scores, *products, q_size, k_size))
    for made in (*products, new):
        made.meta.update(node.meta)
        made.stack_trace = node.stack_trace
    node.replace_all_uses_with(new)
    for old in (node, *tables):
        if not old.users:
            unit.graph.erase_node(old)
    return names


def _layer(unit: fx.GraphModule, path: str) -> str:
    """Name of the Linear on the table at ``path``, made where there is none."""
    owner, _, attribute = path.rpartition(".")
    holder = unit.get_submodule(owner)
    if not isinstance(getattr(holder, attribute + _SUFFIX, None), LinearView):
        holder.add_module(attribute + _SUFFIX, LinearView(attribute, holder.get_parameter(attribute)))
    return path + _SUFFIX
