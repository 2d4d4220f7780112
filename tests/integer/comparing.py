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


class _Notes(fx.Interpreter):
    """Runs a fake-quantized unit and notes what goes into each quantizer, in the order of execution."""

    def __init__(self, unit: fx.GraphModule):
        super().__init__(unit)
        self.inputs: dict[str, Tensor] = {}

    def call_module(self, target: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, FakeQuantize):
            self.inputs[target] = args[0]
        return super().call_module(target, args, kwargs)


@torch.no_grad()
def differing_codes(
    unit: fx.GraphModule, rewritten: fx.GraphModule, args: tuple, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, list[str]]:
    """(codes compared, problems) of a unit fed with equal inputs.

    A problem is a code that is not that of its number, or that differs from the fake-quantized unit's while the numbers
    differ by more than the rounding limit: it then lies no nearer to a boundary. What follows a differing code is not
    fed equal inputs any more and is left out.
    """
    notes = _Notes(unit)
    notes.run(*args)
    names = {id(m): n for n, m in _encoders(rewritten).items()}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    plain = ReferenceBackend.encode

    def encode(self: ReferenceBackend, encoder: Encoder, x: Tensor) -> Tensor:
        codes = plain(self, encoder, x)
        found[names[id(encoder)]] = (x, codes)
        return codes

    monkeypatch.setattr(ReferenceBackend, "encode", encode)
    with use_backend("reference"):
        rewritten(*args)
    monkeypatch.undo()
    compared, problems = 0, []
    for target, wanted in notes.inputs.items():
        x, codes = found[target.removesuffix("_post_act_fake_quantizer")]
        quantizer = unit.get_submodule(target)
        right = quantizer.encode(wanted).reshape(codes.shape)
        compared += codes.numel()
        if not torch.equal(quantizer.encode(x).reshape(codes.shape), codes.long()):
            problems.append(f"{target}: not the codes of the numbers that it was given")
        differ = codes != right
        if bool(differ.any()):
            far = (x - wanted.reshape(x.shape)).abs() > ROUNDING_LIMIT * wanted.abs().max()
            if bool((far & differ).any()):
                problems.append(f"{target}: {int((far & differ).sum())} of {codes.numel()} codes")
            break
    return compared, problems


def _encoders(rewritten: fx.GraphModule) -> dict[str, Encoder]:
    return {m.name: m for m in rewritten.modules() if isinstance(m, Encoder)}
