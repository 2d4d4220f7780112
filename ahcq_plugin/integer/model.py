# SPDX-License-Identifier: Apache-2.0
"""From a quantized model to one that computes on integers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from ahcq_plugin.export.convert import activation_operand, check_frozen, patches_of, weight_operand
from ahcq_plugin.export.matmul import Unsupported, check_supported
from ahcq_plugin.export.operands import Activation, PerHeadOperand, SpecError, UniformOperand
from ahcq_plugin.export.sites import Site, find_sites
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.graph.allowed import is_left
from ahcq_plugin.graph.ops import GraphIndex
from ahcq_plugin.graph.positions import exception_of
from ahcq_plugin.integer.encoder import Encoder
from ahcq_plugin.integer.heads import PerHeadEncoder, PerHeadProduct
from ahcq_plugin.integer.layers import IntegerConv2d, IntegerGroupedConv2d, IntegerLinear
from ahcq_plugin.integer.parts import run_in_parts
from ahcq_plugin.integer.products import IntegerProduct
from ahcq_plugin.integer.rewrite import Rewriter
from ahcq_plugin.quantizers import FakeQuantize, UniformFakeQuantize
from ahcq_plugin.support.given import check_model

#: How weights are kept: packed beside the form that is multiplied with, made at first use; or packed alone.
MEMORY = ("fast", "low")
#: Key of a unit's ``meta``: its integer layers and products by the names that ``export`` gives its matmuls.
MATMULS = "ahcq_integer_matmuls"


@torch.no_grad()
def to_integer(qmodel: nn.Module, memory: str = "fast") -> nn.Module:
    """A model that computes every matmul of every quantized unit on integers, bit-equal to ``export.golden``.

    Args:
        qmodel: what ``quantize`` returned, or ``load_quantized`` read: frozen, float32. It is not changed.
        memory: ``fast`` keeps each weight twice, packed and, from its first use on, as it is multiplied with; ``low``
            keeps it packed alone and unpacks it at every use.
    Returns:
        A copy of the model in which each unit is an ``fx.GraphModule`` of integer modules; it has no gradients, no fake
        quantizers, and of the units' weights packed codes only. What lies outside of units is copied as it is, but the
        decoder takes a batch of prompts in parts (``integer/parts.py``).
    Raises:
        ValueError: no quantized unit, or an unknown ``memory``.
        SpecError: a quantizer is not frozen, a weight is off its grid, or a matmul that integers cannot do (named).
    """
    if memory not in MEMORY:
        raise ValueError(f"`memory` must be one of {', '.join(MEMORY)}, got {memory!r}")
    check_model(qmodel, "qmodel")
    units = prepared_units(qmodel)
    if not units:
        raise ValueError("the model has no quantized unit: give what `quantize` returned or `load_quantized` read")
    done: dict[int, Any] = {}
    for name, unit in units.items():
        if id(unit) not in done:
            done[id(unit)] = integer_unit(unit, name, memory)
    model = copy.deepcopy(qmodel, done).requires_grad_(False).eval()
    run_in_parts(model)
    return model


@torch.no_grad()
def integer_unit(unit: fx.GraphModule, name: str = "", memory: str = "fast") -> fx.GraphModule:
    """One unit on integers; arguments and errors as of ``to_integer``."""
    sites, left_out = find_sites(unit)
    index, modules = GraphIndex(unit, unit.graph), dict[str, nn.Module]()
    for node in unit.graph.nodes:
        quantizer = index.module(node)
        if isinstance(quantizer, FakeQuantize):
            modules[node.name] = _encoder(quantizer, str(node.target)).to(quantizer.scale.device)
    for site in sites:
        try:
            modules[site.node.name] = _matmul(unit, site, memory == "fast", modules).to(next(unit.parameters()).device)
        except SpecError as error:
            raise type(error)(f"unit '{name}', node '{site.node.name}': {error}") from None
    for node in unit.graph.nodes:
        if node.name in left_out and not (is_left(unit, node) or exception_of(index, node)):
            raise SpecError(
                f"unit '{name}', node '{node.name}' cannot run on integers: {left_out[node.name]}; leave the unit out "
                "with `units=`"
            )
    rewritten = Rewriter(unit, modules).run()
    rewritten.meta[MATMULS] = {node: module for node, module in modules.items() if not isinstance(module, Encoder)}
    return rewritten


def _encoder(quantizer: FakeQuantize, target: str) -> Encoder:
    """What encodes in a quantizer's place."""
    tensor, levels = target.removesuffix("_post_act_fake_quantizer"), None
    if isinstance(quantizer, UniformFakeQuantize) and quantizer.scale.numel() > 1:
        check_frozen(quantizer)
        scales, zero_points = (t.detach().cpu().numpy() for t in (quantizer.scale, quantizer.zero_point))
        grids = PerHeadOperand(quantizer.bits, scales.astype(np.float32), zero_points.astype(np.int64))
        return PerHeadEncoder(grids, quantizer.head_axis if quantizer.per_head else quantizer.ch_axis, tensor)
    operand = activation_operand(quantizer)
    if operand.family in ("hluq", "table"):
        levels = quantizer.decode(torch.arange(2**quantizer.bits, device=quantizer.scale.device))
    return Encoder(operand, levels, tensor)


def _matmul(unit: fx.GraphModule, site: Site, keep: bool, coders: Mapping[str, nn.Module]) -> nn.Module:
    if site.layer is None:
        left, right = (_factor(unit, source.quantizer, coders) for source in (site.left, site.right))
        if not isinstance(right, UniformOperand | PerHeadOperand):
            raise Unsupported(f"the right operand must be uniform, got {right.family}")
        check_supported(site.kind, left, right, None)
        per_head = any(isinstance(operand, PerHeadOperand) for operand in (left, right))
        return (PerHeadProduct if per_head else IntegerProduct)(left, right)
    left = activation_operand(unit.get_submodule(site.left.quantizer.target))
    layer, weight, patches = site.layer, weight_operand(site.layer), patches_of(site.layer)
    bias = _bias(layer, len(weight.codes))
    check_supported("linear", left, weight, patches)
    if patches is None:
        return IntegerLinear(left, weight, bias, keep)
    return (IntegerConv2d if patches.groups == 1 else IntegerGroupedConv2d)(left, weight, bias, patches, keep)


def _factor(unit: fx.GraphModule, quantizer: fx.Node, coders: Mapping[str, nn.Module]) -> Activation:
    """The operand of a product of activations; of one that is per head the grids by label."""
    coder = coders[quantizer.name]
    return (
        coder.operand()
        if isinstance(coder, PerHeadEncoder)
        else activation_operand(unit.get_submodule(str(quantizer.target)))
    )


def _bias(layer: nn.Module, n: int) -> np.ndarray:
    return np.zeros(n, np.float32) if layer.bias is None else layer.bias.detach().float().cpu().numpy()
