# SPDX-License-Identifier: Apache-2.0
"""All launches that a model asks of the engine for one item, from the model itself: traced, run on no data.

On the device ``meta`` tensors have shapes and no values, so a SAM-H costs seconds. Shapes are those of the matmuls
between the quantizers that a recipe places; what stays in floating point outside of the units is not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from ahcq_plugin.export.operands import top
from ahcq_plugin.export.sites import Site, find_sites
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.graph.calls import record_calls
from ahcq_plugin.graph.ops import GraphIndex, function_name
from ahcq_plugin.hls.engine import descriptor as fields
from ahcq_plugin.hls.engine.cycles import Output
from ahcq_plugin.hls.engine.shape import Shape
from ahcq_plugin.ptq import prepare
from ahcq_plugin.ptq.prepared import intercepted
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.ptq.unit_runner import UnitRunner

#: Family of a quantizer -> that of a spec.
_FAMILIES = {"uniform": "uniform", "cag": "grouped", "hluq": "hluq", "lnq": "table", "agq": "table"}
_ACTIVATIONS = ("gelu", "relu", "GELU", "ReLU")
TABLE_TOP = 2**16  # of LNQ: 16 fraction bits, and the value 1


@dataclass(frozen=True)
class Launch:
    """One matmul of one item.

    Attributes:
        unit, name: where it runs.
        shape: what it asks of the engine.
        output: what is written: codes where only a quantizer reads it (through moves of elements, GELU or ReLU),
            accumulators of 16 bits of Q.K^T, else float32.
    """

    unit: str
    name: str
    shape: Shape
    output: Output


def record_launches(
    build: Callable[[], nn.Module],
    items: Sequence[Callable[[], Any]],
    forward: Callable[[nn.Module, Any], Any],
    recipe: Recipe,
    device: str = "meta",
) -> list[list[Launch]]:
    """Of each item in the order of execution; a unit that runs several times gives its matmuls as often.

    Args:
        build: makes the model in evaluation mode, on the default device.
        items: each makes what ``forward`` takes; in the first one all units run.
        recipe: places the quantizers. The groups of CAG, which calibration would make, are drawn at random, so that
            their ends lie within folds as often as those of real ones.
        device: the default device meanwhile; ``cpu`` for a model that looks at its data.
    """
    with torch.device(device), torch.no_grad():
        model = build()
        calls = record_calls(model, lambda: forward(model, items[0]())).by_name
        units = prepared_units(prepare(model, recipe, calls=calls))
        recorders = {name: _Recorder(name, unit, recipe) for name, unit in units.items()}
        found = []
        with intercepted(units, lambda name, _, args, kwargs: recorders[name](*args, **kwargs)):
            for item in items:
                found.append([])
                for recorder in recorders.values():
                    recorder.found = found[-1]
                forward(model, item())
    return found


class _Recorder(UnitRunner):
    """Runs a unit and notes its launches."""

    def __init__(self, name: str, unit: fx.GraphModule, recipe: Recipe):
        super().__init__(unit)
        self.name, self.recipe = name, recipe
        self.found: list[Launch] = []
        self.sites = {site.node: site for site in find_sites(unit)[0]}
        self.outputs = _outputs(unit, self.sites, recipe.a_bits)

    def run_node(self, n: fx.Node) -> Any:
        """One node; a launch where it is a matmul."""
        out = super().run_node(n)
        if n in self.sites:
            shape, outputs = self._shape(self.sites[n], out), self.outputs[n]
            part = replace(shape, n=-(-shape.n // len(outputs)))
            self.found += [Launch(self.name, n.name, part, output) for output in outputs]
        return out

    def _shape(self, site: Site, out: torch.Tensor) -> Shape:
        quantizer = self.module.get_submodule(site.left.quantizer.target)
        family, bits = _FAMILIES[quantizer.family], self.recipe.a_bits
        if site.layer is None:
            left = self.env[site.left.path[-1] if site.left.path else site.left.quantizer]
            batch, (m, n), k, right_bits = prod(out.shape[:-2]), out.shape[-2:], left.shape[-1], bits
        else:
            weight = site.layer.weight
            n, k, batch, right_bits = len(weight), weight[0].numel(), 1, self.recipe.w_bits
            k *= getattr(site.layer, "groups", 1)  # a convolution with groups has its whole weight here
            m = out.numel() // n
        groups = drawn_groups(k, self.recipe.cag_groups) if family == "grouped" else (k,)
        split = min(16, 2 ** (bits - 1)) if family == "hluq" else 0  # as good as any: it changes no cycle
        largest = {"table": TABLE_TOP, "hluq": top(bits) - split}.get(family, top(bits))
        return Shape(site.kind, family, bits, right_bits, largest, split, groups, 1, batch, m, n)


def drawn_groups(k: int, count: int) -> tuple[int, ...]:
    """Sizes of ``count`` random groups of k channels, always the same ones; of few channels a group each."""
    count = min(count, k)
    cuts = np.random.default_rng([k, count]).choice(np.arange(1, k), count - 1, replace=False)
    return tuple(np.diff([0, *np.sort(cuts), k]).tolist())


def _outputs(unit: fx.GraphModule, sites: dict[fx.Node, Site], bits: int) -> dict[fx.Node, list[Output]]:
    """What is written of each matmul; of a joint projection an entry for q, k and v each, commands of their own."""
    index = GraphIndex(unit, unit.graph)
    codes: dict[fx.Node, dict[fx.Node, Output]] = {node: {} for node in sites}
    for site in sites.values():
        for operand in (site.left, site.right):
            node, gelu = None if operand is None else operand.quantizer.all_input_nodes[0], False
            while node is not None and node not in sites:
                is_moved = index.shape_source(node)
                gelu = gelu or _name(index, node) in ("gelu", "GELU")
                node = is_moved if is_moved is not None else node.all_input_nodes[0] if _is_fused(index, node) else None
            if node is not None:
                scattered = site.kind == "qk" and operand is site.right
                codes[node][operand.quantizer] = Output(fields.CODES, bits, scattered, gelu)
    return {node: list(codes[node].values()) or [_float_output(site)] for node, site in sites.items()}


def _float_output(site: Site) -> Output:
    return Output(fields.SHORTS if site.kind == "qk" else fields.FLOATS)


def _is_fused(index: GraphIndex, node: fx.Node) -> bool:
    return _name(index, node) in _ACTIVATIONS


def _name(index: GraphIndex, node: fx.Node) -> str | None:
    module = index.module(node)
    return type(module).__name__ if module is not None else function_name(node)
