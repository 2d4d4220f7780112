# SPDX-License-Identifier: Apache-2.0
"""Insert fake quantizers into a traced unit at the sites that ``find_roles`` found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

from ahcq_plugin.graph.allowed import computed_parameters
from ahcq_plugin.graph.roles import RoleSite, find_roles, find_weight_layers
from ahcq_plugin.graph.unit import UNIT_KEY
from ahcq_plugin.quantizers.layers import quantize_layer

QUANTIZER_SUFFIX = "_post_act_fake_quantizer"  # MQBench's reconstruction finds activation quantizers by this ending


@dataclass(frozen=True)
class Placement:
    """Where a quantizer was put; node names instead of nodes, so that it survives copies of the graph."""

    node: str
    role: str
    quantizer_name: str
    consumers: tuple[tuple[str, int | str], ...]
    layers: tuple[str, ...]


def placements(gm: fx.GraphModule) -> list[Placement]:
    """The activation quantizers that ``place`` put into a unit, in graph order."""
    return gm.meta[UNIT_KEY]["placements"]


def place(
    gm: fx.GraphModule,
    make_activation: Callable[[str, RoleSite], nn.Module | None],
    make_weight: Callable[[nn.Linear | nn.Conv2d, str], nn.Module | None],
    share_inputs: bool = True,
) -> list[Placement]:
    """Quantize a traced unit, in place.

    Args:
        gm: from ``trace_unit``.
        make_activation: (role, site) -> quantizer; None leaves the tensor in floating point.
        make_weight: (layer, name) -> weight quantizer; None leaves the layer alone.
        share_inputs: one quantizer per (tensor, role); False: one per consuming Linear or Conv2d.
    Returns:
        The activation quantizers in graph order, also given by ``placements(gm)`` later. The quantizer
        ``<node>_<role>[_<n>]_post_act_fake_quantizer`` follows its tensor, and the site's consumers read it.
    Raises:
        ValueError: the unit has quantizers already, or ``find_roles`` refuses it.
    """
    meta = gm.meta.setdefault(UNIT_KEY, {"name": type(gm).__name__, "placements": []})
    if meta["placements"]:
        raise ValueError(f"unit '{meta['name']}' has quantizers already; trace it anew")
    sites = find_roles(gm)
    if not share_inputs:
        sites = [part for site in sites for part in _split(site)]
    anchors: dict[fx.Node, fx.Node] = {}
    placed = []
    for site in sites:
        quantizer = make_activation(site.role, site)
        if quantizer is not None:
            name = _free_name(gm, site)
            gm.add_submodule(name, quantizer)
            _insert(gm, site, name, anchors)
            consumers = tuple((node.name, key) for node, key in site.consumers)
            placed.append(Placement(site.node.name, site.role, name, consumers, site.layers))
    for name in find_weight_layers(gm):
        layer = gm.get_submodule(name)
        if computed_parameters(layer):  # the caller left it, or `find_roles` had refused it
            continue
        weight_fake_quant = make_weight(layer, name)
        if weight_fake_quant is not None:
            gm.add_submodule(name, quantize_layer(layer, weight_fake_quant))
    gm.graph.lint()
    gm.recompile()
    meta["placements"] = placed
    return placed


def _split(site: RoleSite) -> list[RoleSite]:
    if not site.layers:
        return [site]
    return [replace(site, consumers=(edge,), layers=(edge[0].target,)) for edge in site.consumers]


def _free_name(gm: fx.GraphModule, site: RoleSite) -> str:
    stem, count = f"{site.node.name}_{site.role}", 0
    name = stem + QUANTIZER_SUFFIX
    while hasattr(gm, name):
        count += 1
        name = f"{stem}_{count}{QUANTIZER_SUFFIX}"
    return name


def _insert(gm: fx.GraphModule, site: RoleSite, name: str, anchors: dict[fx.Node, fx.Node]) -> None:
    if site.node not in anchors:
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        anchors[site.node] = placeholders[-1] if site.node.op == "placeholder" else site.node
    with gm.graph.inserting_after(anchors[site.node]):
        quantized = gm.graph.call_module(name, (site.node,))
    anchors[site.node] = quantized

    def rewired(argument: Any) -> Any:
        return map_arg(argument, lambda n: quantized if n is site.node else n)

    for node, key in site.consumers:
        if isinstance(key, str):
            node.update_kwarg(key, rewired(node.kwargs[key]))
        else:
            node.update_arg(key, rewired(node.args[key]))
