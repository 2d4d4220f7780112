# SPDX-License-Identifier: Apache-2.0
"""The integer model beside the golden model and beside the fake-quantized one: what differs, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ahcq_plugin.export import make_spec
from ahcq_plugin.export.interpret import Call, golden_output, interpreted
from ahcq_plugin.export.matmul import accumulator_range, signed_bits
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.integer import use_backend
from ahcq_plugin.integer.backends.reference import ReferenceBackend
from ahcq_plugin.integer.encoder import Encoder
from ahcq_plugin.integer.model import MATMULS
from ahcq_plugin.quantizers import FakeQuantize

#: Two float32 computations of one number in a unit may differ by this share of the tensor's largest: some 40 roundings.
ROUNDING_LIMIT = 40 * 2.0**-24


@torch.no_grad()
def differing_matmuls(
    qmodel: nn.Module, integer: nn.Module, batches: Iterable[Any], forward: Callable, backend: str
) -> tuple[int, list[str]]:
    """(calls compared, names): every matmul fed with the codes that it has in ``qmodel``; those that are not equal,
    bit for bit, to the golden model."""
    compared, wrong = 0, []
    spec = {}

    def on_matmul(unit: str, call: Call) -> Tensor:
        nonlocal compared
        matmul, node = spec[unit, call.site.node.name], call.site.node.name
        if matmul.kind != "linear":
            k = call.left.shape[-1]  # of attention it may differ from call to call
            width = signed_bits(*accumulator_range(matmul.left, matmul.right, k))
            matmul = dataclasses.replace(matmul, k=k, accumulator_bits=width)
        module = integer.get_submodule(unit).meta[MATMULS][node]
        codes = [operand.to(torch.uint8) for operand in (call.left, call.right) if operand is not None]
        with use_backend(backend):
            found = call.rescale(module(*codes))
        compared += 1
        if not torch.equal(found, golden_output(matmul, call)[1]):
            wrong.append(f"{unit}.{node}")
        return call.float_output()

    batches = list(batches)
    for unit, matmul in make_spec(qmodel, batches[0], forward).matmuls():
        spec[unit.name, matmul.name] = matmul
    with interpreted(prepared_units(qmodel), on_matmul):
        for batch in batches:
            forward(qmodel, batch)
    return compared, wrong


class _Values(fx.Interpreter):
    """Runs a unit and keeps what every node gives, by its name."""

    def __init__(self, unit: fx.GraphModule):
        super().__init__(unit, garbage_collect_values=False)
        self.found: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.found[n.name] = super().run_node(n)
        return self.found[n.name]


@torch.no_grad()
def differing_codes(
    unit: fx.GraphModule, rewritten: fx.GraphModule, args: tuple, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, list[str]]:
    """(codes compared, problems) of a unit fed with equal inputs, in the order of execution.

    A problem is a code that differs from the fake-quantized unit's although its number there is no nearer to a boundary
    than the rounding limit. What follows a differing code is not fed equal inputs any more and is left out.
    """
    wanted, found = _Values(unit), _Values(rewritten)
    wanted.run(*args)
    inside: dict[str, Tensor] = {}  # attention and MLPs encode inside of a node
    plain = ReferenceBackend.encode

    def encode(self: ReferenceBackend, encoder: Encoder, x: Tensor) -> Tensor:
        inside[encoder.name] = plain(self, encoder, x)
        return inside[encoder.name]

    monkeypatch.setattr(ReferenceBackend, "encode", encode)
    with use_backend("reference"):
        found.run(*args)
    monkeypatch.undo()
    compared, problems = 0, []
    for node in unit.graph.nodes:
        quantizer = unit.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(quantizer, FakeQuantize):
            continue
        source = node.all_input_nodes[0].name  # where a Linear encodes its outputs itself, codes are moved about
        codes = inside.get(node.target.removesuffix("_post_act_fake_quantizer"), found.found.get(source))
        assert codes is not None and codes.dtype == torch.uint8, node.name
        x = wanted.found[source]
        near = ROUNDING_LIMIT * x.abs().max()
        right = quantizer.encode(x).reshape(codes.shape)
        below, above = (quantizer.decode(quantizer.encode(t)) for t in (x - near, x + near))
        level = quantizer.decode(codes.long().reshape(x.shape))
        compared += codes.numel()
        if bool(((level < below) | (level > above)).any()):
            problems.append(f"{node.name}: {int((codes != right).sum())} of {codes.numel()} codes")
        if bool((codes != right).any()):
            break
    return compared, problems
