# SPDX-License-Identifier: Apache-2.0
"""A SAM on the engine in C++ simulation: every matmul by a descriptor, in one memory; on demand softmaxes too."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from ahcq_plugin import quantize
from ahcq_plugin.export import SpecError, golden, make_spec
from ahcq_plugin.export.compare import golden_forward
from ahcq_plugin.export.interpret_softmax import SoftmaxCall, run_softmax
from ahcq_plugin.hls.engine import simulate
from ahcq_plugin.hls.engine.config import EngineConfig
from ahcq_plugin.hls.engine.program import Program, engine_forward
from ahcq_plugin.hls.vectors import make_vectors
from ahcq_plugin.zoo.sam import box_forward
from tests.export.test_softmax_forward import BATCH, CHANGES, TOKENS, Attention
from tests.hls.engine.test_softmax_command import make_step

SOFTMAX = EngineConfig(softmax=True)
LAYER = "mask_decoder.transformer.layers.0"
ENCODER = "image_encoder.blocks.0"


@pytest.mark.slow
def test_a_whole_image_is_the_golden_models(quantized, spec, scenes) -> None:
    out, rows = engine_forward(quantized, Program(spec), scenes[1], box_forward)
    assert len(rows) == sum(1 for _ in spec.matmuls())
    assert not any(row.different for row in rows.values())
    wanted = golden_forward(quantized, spec, scenes[1], box_forward)
    assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))
    assert np.isfinite(out[0].numpy()).all()


def attentions(program: Program, unit: str) -> list[list]:
    """Commands of Q.K^T, softmax, A.V whose scores and codes are pieces of one memory."""
    at = {command.descriptor.out: command for (name, *_), command in program.commands.items() if name == unit}
    found = []
    for (name, *_), second in program.softmaxes.items():
        readers = [command for command in program.commands.values() if command.descriptor.left == second.descriptor.out]
        if name == unit:
            found.append([at[second.descriptor.left], second, *readers])
    return found


def test_attention_is_three_commands_that_keep_scores_and_codes(quantized, spec, scenes) -> None:
    """Of a decoder layer, and of an encoder's block, whose scores get relative positions."""
    program = Program(spec, SOFTMAX, softmax="tables")
    _, rows = engine_forward(quantized, program, scenes[0], box_forward, [LAYER, ENCODER])
    assert not any(row.different for row in rows.values())
    softmaxes = {key: row for key, row in rows.items() if key[1] not in {one.name for one in spec[key[0]].matmuls}}
    assert len(softmaxes) == 4 and not any(row.reason for row in softmaxes.values())
    assert all(row.outputs for row in softmaxes.values())
    steps = program.steps(LAYER)
    assert sum(step.op == "engine" for step in steps) == len(spec[LAYER].matmuls) + 2 * 3
    assert not any(step.op == "softmax" for step in steps)
    assert [len(attentions(program, unit)) for unit in (LAYER, ENCODER)] == [3, 1]
    for first, second, third in (*attentions(program, LAYER), *attentions(program, ENCODER)):
        floats, codes = third.read_output(program.image), second.read_codes(program.image)
        pieces = ((first, first.destination.words), (second, second.words), (third, third.destination.words))
        for command, words in pieces:
            program.image.write(command.descriptor.out, np.full(words, 0xDEADBEEF, np.uint32))
        simulate.run(program.image, [command.descriptor for command in (first, second, third)], SOFTMAX)
        assert (third.read_output(program.image) == floats).all()
        assert (second.read_codes(program.image) == codes).all() and len(np.unique(codes)) > 2


@pytest.mark.parametrize(
    ("change", "bits", "reason"),
    [
        (CHANGES["none"], 4, ""),
        (CHANGES["scaled"], 4, ""),
        (CHANGES["bias"], 4, "terms are added to its scores"),
        (CHANGES["none"], 8, "its scores have 20 bits, the engine writes 16"),
        (lambda self, scores: scores.transpose(-2, -1), 4, "its scores are moved behind their product"),
    ],
    ids=["plain", "scaled", "terms", "bits", "moved"],
)
def test_scores_that_a_command_cannot_read_stay_on_the_host_and_say_why(change, bits: int, reason: str) -> None:
    recipe = {"name": "rtn", "lnq": True, "a_bits": bits}
    qmodel, _ = quantize(torch.nn.Sequential(Attention(change)).eval(), [BATCH], recipe, units=["0"], progress=False)
    spec = make_spec(qmodel, BATCH)
    out, rows = engine_forward(qmodel, Program(spec, SOFTMAX, softmax="tables"), BATCH)
    assert torch.equal(out, golden_forward(qmodel, spec, BATCH, softmax="tables"))
    assert not any(row.different for row in rows.values()) and len(rows) == 5
    (row,) = (row for (_, name), row in rows.items() if name not in {matmul.name for _, matmul in spec.matmuls()})
    assert row.reason == reason and row.outputs == (0 if reason else len(BATCH) * TOKENS**2)


def test_heads_with_scales_of_their_own(cases, spec) -> None:
    """Two products of three heads, whose codes have bounds of their own too."""
    rng, program = np.random.default_rng(0), Program(spec, SOFTMAX, softmax="tables")
    product = cases.make_matmul("qk", "per_head", 4, 4, 16, 20, rng, "per_head")
    vectors = make_vectors(product, 6, 9, 0)
    wanted = golden.run(product, vectors.left, vectors.right)
    assert (program.execute("unit", product, vectors.left, vectors.right) == wanted.output).all()
    heads = np.broadcast_to((np.arange(6) % 3)[:, None], (6, 9))
    step = make_step("lnq", 4, 3, 3, rng)
    call = SoftmaxCall("softmax", step, wanted.accumulators[..., 0], heads, product.name)
    codes = program.execute_softmax("unit", call)
    assert (codes == run_softmax(call)).all() and len(np.unique(codes)) > 2
    with pytest.raises(SpecError, match="moved behind their product"):
        program.execute_softmax("unit", dataclasses.replace(call, heads=(heads + 1) % 3))


def test_terms_of_a_later_call_are_laid_out_as_the_command_reads_them(cases, spec) -> None:
    """Also where they would fit another picture of keys; those of another picture stay on the host."""
    rng, program = np.random.default_rng(0), Program(spec, SOFTMAX, softmax="tables")
    product = cases.make_matmul("qk", "uniform", 4, 4, 16, 20, rng, "uniform")
    vectors = make_vectors(product, 2, 9, 0)
    sums = golden.run(product, vectors.left, vectors.right).accumulators[..., 0]
    program.execute("unit", product, vectors.left, vectors.right)
    step = make_step("lnq", 4, 1, 1, rng, (-11, -10))
    of_columns, nothing = rng.integers(-4000, 4001, sums.shape), np.zeros_like(sums)
    calls = [(nothing, of_columns), (nothing, nothing), (nothing, np.tile(of_columns[..., :10], 2))]
    for terms in calls:  # 1 x 20; any picture; 2 x 10 and 1 x 20
        call = SoftmaxCall("softmax", step, (sums << 3) + terms[0] + terms[1], None, product.name, 3, terms)
        assert (program.execute_softmax("unit", call) == run_softmax(call)).all()
    rows = np.repeat(of_columns[..., :2], 10, -1)
    call = SoftmaxCall("softmax", step, (sums << 3) + rows, None, product.name, 3, (rows, nothing))
    with pytest.raises(SpecError, match="another picture"):
        program.execute_softmax("unit", call)


@pytest.mark.slow
def test_a_whole_image_with_softmax_on_tables_is_the_golden_models(quantized, spec, scenes) -> None:
    out, rows = engine_forward(quantized, Program(spec, SOFTMAX, softmax="tables"), scenes[1], box_forward)
    assert not any(row.different for row in rows.values())
    wanted = golden_forward(quantized, spec, scenes[1], box_forward, softmax="tables")
    assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))
    assert not any(row.reason for row in rows.values())
    names = {(unit.name, matmul.name) for unit in spec.units for matmul in unit.matmuls}
    ranked = [row for key, row in rows.items() if key not in names and not row.reason]
    assert len(ranked) == 6 + 7 and all(row.outputs for row in ranked)


def test_a_program_whose_softmax_has_no_unit_is_refused(spec) -> None:
    with pytest.raises(SpecError, match="EngineConfig\\(softmax=True\\)"):
        Program(spec, softmax="tables")
    with pytest.raises(ValueError, match="`softmax` must be one of float, tables, got 'table'"):
        Program(spec, softmax="table")
