# SPDX-License-Identifier: Apache-2.0
"""Make the layer spec of a quantized model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ahcq_plugin.export.convert import activation_operand, patches_of, product_operand, weight_operand, with_equal_heads
from ahcq_plugin.export.interpret import Call, interpreted
from ahcq_plugin.export.matmul import Matmul, Unsupported, accumulator_range, check_supported, signed_bits
from ahcq_plugin.export.operands import SpecError
from ahcq_plugin.export.sites import Site
from ahcq_plugin.export.spec import Spec, Step, UnitSpec
from ahcq_plugin.export.spec_io import save_spec
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.graph.ops import GraphIndex, function_name
from ahcq_plugin.quantizers import FakeQuantize
from ahcq_plugin.support.batches import Forward, check_item, default_forward, model_device, naming_item, to_device
from ahcq_plugin.support.files import given_path
from ahcq_plugin.support.given import check_model

logger = logging.getLogger(__name__)


def export_spec(qmodel: nn.Module, path: str | Path, batch: Any = None, forward: Forward | None = None) -> Spec:
    """Write the spec of a frozen model into the folder ``path`` and return it; see ``make_spec`` and ``save_spec``."""
    path = given_path(path)
    spec = make_spec(qmodel, batch, forward)
    save_spec(spec, path)
    return spec


def make_spec(qmodel: nn.Module, batch: Any = None, forward: Forward | None = None) -> Spec:
    """The spec of every quantized unit.

    Args:
        qmodel: what ``quantize`` returned, or ``load_quantized`` read.
        batch: one item that the model runs on: shapes come from it (the k of attention is its number of tokens).
            None: a SAM gets an image of zeros and one box.
        forward: as for ``quantize``.
    Raises:
        ValueError: no quantized unit, or no ``batch`` for a model that is not a SAM.
        SpecError: a quantizer is not frozen, a weight is off its grid.
    """
    check_model(qmodel, "qmodel")
    units = prepared_units(qmodel)
    if not units:
        raise ValueError("the model has no quantized unit: export what `quantize` returned or `load_quantized` read")
    if batch is None:
        from ahcq_plugin.zoo.sam import box_forward  # loads segment_anything, which no other use of this room needs

        batch, forward = _sam_item(qmodel), box_forward
    forward, device = forward or default_forward, model_device(qmodel)
    matmuls: dict[str, dict[str, Matmul]] = {}

    def on_matmul(unit: str, call: Call) -> Tensor:
        out, node = call.float_output(), call.site.node.name
        exported = matmuls.setdefault(unit, {})
        if node in exported or node in reasons[unit]:
            return out
        try:
            exported[node] = _matmul(units[unit], call, out)
        except Unsupported as reason:
            reasons[unit][node] = str(reason)
        except SpecError as error:
            raise SpecError(f"unit '{unit}', node '{node}': {error}") from None
        return out

    with torch.no_grad(), interpreted(units, on_matmul) as interpreters:
        reasons = {name: dict(interpreter.left_out) for name, interpreter in interpreters.items()}
        check_item(batch, "batch")
        with naming_item("batch"):
            forward(qmodel, to_device(batch, device))
    left_out = [f"{unit}.{node}: {reason}" for unit in units for node, reason in reasons[unit].items()]
    left_out += [f"{unit}: no data reaches its matmuls" for unit in units if unit not in matmuls]
    for line in left_out:
        logger.warning("not exported: %s", line)
    specs = [
        UnitSpec(name, tuple(exported.values()), _steps(units[name], interpreters[name].sites, set(exported)))
        for name, exported in matmuls.items()
    ]
    return Spec(tuple(specs), tuple(left_out))


def _sam_item(model: nn.Module) -> dict[str, Tensor]:
    side = getattr(getattr(model, "image_encoder", None), "img_size", None)
    if not isinstance(side, int) or not hasattr(model, "prompt_encoder") or not hasattr(model, "mask_decoder"):
        raise ValueError("this model is no SAM: give `batch`, one item that it runs on, so that shapes are known")
    box = torch.tensor([[side / 4, side / 4, side * 3 / 4, side * 3 / 4]])
    return {"image": torch.zeros(1, 3, side, side), "boxes": box}


def _matmul(gm: fx.GraphModule, call: Call, out: Tensor) -> Matmul:
    site, layer = call.site, call.site.layer
    bias, patches = None, None
    if layer is None:
        if call.left.shape[:-2] != call.right.shape[:-2]:
            raise Unsupported(f"its operands {tuple(call.left.shape)} and {tuple(call.right.shape)} are broadcast")
        batch, m, n = int(np.prod(call.left.shape[:-2])), call.left.shape[-2], call.right.shape[-1]
        k = call.left.shape[-1]
        left, right = with_equal_heads(
            product_operand(gm.get_submodule(site.left.quantizer.target), call.left_params),
            product_operand(gm.get_submodule(site.right.quantizer.target), call.right_params),
        )
    else:
        left = activation_operand(gm.get_submodule(site.left.quantizer.target))
        right, patches = weight_operand(layer), patches_of(layer)
        bias = np.zeros(len(right.codes), np.float32)
        if layer.bias is not None:
            bias = layer.bias.detach().float().cpu().numpy()
        (n, k), batch, m = right.codes.shape, 1, out.numel() // len(right.codes)
    check_supported(site.kind, left, right, patches)
    width = signed_bits(*accumulator_range(left, right, k))
    name = "" if layer is None else site.node.target
    return Matmul(site.node.name, site.kind, name, batch, m, k, n, left, right, bias, width, patches)


def _steps(gm: fx.GraphModule, sites: Mapping[fx.Node, Site], matmuls: set[str]) -> tuple[Step, ...]:
    """Every node but those that only handle sizes."""
    index = GraphIndex(gm, gm.graph)
    steps, kept = [], set()
    for node in gm.graph.nodes:
        inputs = tuple(n.name for n in node.all_input_nodes if n.name in kept)
        if index.is_scalar(node) or (node.op not in ("placeholder", "get_attr") and not inputs):
            continue
        kept.add(node.name)
        if node.name in matmuls:
            site = sites[node]
            quantizers = tuple(o.quantizer.name for o in (site.left, site.right) if o is not None)
            steps.append(Step(node.name, "matmul", inputs, node.name, quantizers))
        else:
            steps.append(Step(node.name, _operation(index, node), inputs))
    return tuple(steps)


def _operation(index: GraphIndex, node: fx.Node) -> str:
    """Name of what a node does: ``input``, ``output``, ``constant``, ``quantize``, ``float_matmul``
    (left out of the spec), or a function, method or module."""
    module = index.module(node)
    if module is not None:
        return "quantize" if isinstance(module, FakeQuantize) else type(module).__name__
    plain = {"placeholder": "input", "output": "output", "get_attr": "constant"}
    name = plain.get(node.op) or function_name(node) or str(node.target)
    return "float_matmul" if name == "matmul" else name
