# SPDX-License-Identifier: Apache-2.0
"""Every matmul of an encoder block and of a decoder layer of the packaged SAM, on the codes that it has on images."""

from __future__ import annotations

import pytest

from ahcq_plugin.hls import HLSOptions, compile_generated, generate, select
from ahcq_plugin.hls.check import check_on_model
from ahcq_plugin.hls.engine.program import Program, engine_forward
from ahcq_plugin.zoo.sam import box_forward

UNITS = ("image_encoder.blocks.0", "mask_decoder.transformer.layers.0")
OPTIONS = HLSOptions(pe=64)


@pytest.fixture(scope="module")
def real_layers(spec, tmp_path_factory):
    layers = select(spec, UNITS, OPTIONS)
    folder = generate(layers, tmp_path_factory.mktemp("real") / "layers")
    return layers, compile_generated(layers, folder)


@pytest.mark.slow
@pytest.mark.parametrize("images", ["scenes", "real_images"])
def test_every_matmul_of_two_units_is_equal(request, quantized, real_layers, images: str) -> None:
    layers, compiled = real_layers
    batches = request.getfixturevalue(images)
    batches = batches[:1] if images == "scenes" else batches
    rows = check_on_model(quantized, compiled, batches, box_forward)
    assert len(rows) == len(layers) == 26
    assert {row.calls for row in rows.values()} == {len(batches)}
    assert all(row.outputs and row.accumulators for row in rows.values())
    assert {top: row.different for top, row in rows.items()} == dict.fromkeys(rows, 0)
    families = {(layer.matmul.kind, layer.matmul.left.family) for layer in layers}
    assert families == {
        ("linear", "grouped"),
        ("linear", "uniform"),
        ("linear", "hluq"),
        ("qk", "uniform"),
        ("av", "table"),
    }


def test_an_encoder_unit_and_a_decoder_layer_are_one_program(quantized, spec, scenes) -> None:
    program = Program(spec)
    _, rows = engine_forward(quantized, program, scenes[0], box_forward, UNITS)
    matmuls = [(unit, matmul.name) for unit in UNITS for matmul in spec[unit].matmuls]
    assert list(rows) == matmuls and len(matmuls) == 26
    assert all(row.calls == 1 and row.outputs for row in rows.values())
    assert {key: row.different for key, row in rows.items()} == dict.fromkeys(matmuls, 0)
    for unit in UNITS:
        steps = program.steps(unit)
        assert [step.name for step in steps if step.op == "engine"] == [m.name for m in spec[unit].matmuls]
        assert {"LayerNorm", "softmax", "add"} <= {step.op for step in steps}
