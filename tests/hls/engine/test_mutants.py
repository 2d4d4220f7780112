# SPDX-License-Identifier: Apache-2.0
"""Each fault in the engine's C++, a line of its own, is seen by its values or as processes that wait for each other."""

from __future__ import annotations

import numpy as np
import pytest

from ahcq_plugin.export import golden
from ahcq_plugin.export.codes import encode
from ahcq_plugin.hls.engine import simulate
from ahcq_plugin.hls.engine.compile import compile_matmul
from ahcq_plugin.hls.engine.config import EngineConfig
from ahcq_plugin.hls.engine.destination import Segment, head_operands, left_rows
from ahcq_plugin.hls.engine.image import Image
from ahcq_plugin.hls.function_tables import gelu
from ahcq_plugin.hls.vectors import make_vectors

SMALL = EngineConfig(cells=2, digit=4, left_depth=24, right_depth=48)
# (file, text, faulty text)
MUTANTS = [
    ("correct.h", "total - right_zero * int64_t(row_multiply)", "total + right_zero * int64_t(row_multiply)"),
    ("correct.h", "both - int64_t(left_zero)", "both + int64_t(left_zero)"),
    ("correct.h", "planes == 2 ? int64_t(uint64_t(above) << 4)", "planes == 2 ? int64_t(uint64_t(above) << 3)"),
    ("correct.h", "right_zero * int64_t(row_shift)", "right_zero * int64_t(row_multiply)"),
    ("correct.h", "head + 1 == c.heads ? 0 : head + 1", "head + 1 == c.heads ? head : head + 1"),
    ("cell.h", "const uint32_t digit = inside ?", "const uint32_t digit = true ?"),
    ("cell.h", "if (at(places, COLUMN_SUMS)) value = 1", "if (at(places, COLUMN_SUMS)) value = 2"),
    ("sequence.h", "of_sums = with_sums && last_step && (tiles != 1 || last_block)", "of_sums = false"),
    ("dequantize.h", "next == OF_GROUP : takes && !last_chunk", "next == OF_GROUP : takes"),
    ("cell.h", "code - c.log_levels : 0", "code - c.log_levels + 1 : 0"),
    ("cell.h", "c.log_levels - 1 - code;", "c.log_levels - code;"),
    ("cell.h", "shifted = inside && code", "shifted = code"),
    ("cell.h", "row_shift) + powers)", "row_shift) + digits)"),
    ("cell.h", "uint32_t(j) < chunks_of(c, places)", "true"),
    ("types.h", "SUM_BITS = 40", "SUM_BITS = 14"),
    ("dequantize.h", "starts ? -0.0f : before", "starts ? -0.0f : 0.0f"),
    ("dequantize.h", "const float t = scaled +", "const float t = scaled -"),
    ("dequantize.h", "if (lane == i) value", "if (lane == (i ^ 1)) value"),
    ("quantize.h", "low |= (code & 15)", "low |= (code & 7)"),
    ("buffers.h", "chunk == (transposed ? CHUNKS - 1 : uint32_t(j))", "chunk == uint32_t(j)"),
    ("buffers.h", "last_cell ? uint16_t(base + length) : base;\n            cell", "base;\n            cell"),
    ("sequence.h", "(size - 1) % LANES + 1", "size % LANES"),
    ("sequence.h", "c.blocks == 1 : blocks_left == 2) ? c.last", "c.blocks == 1 : blocks_left == 3) ? c.last"),
    ("write.h", "window_left <= C::CELLS", "window_left < C::CELLS"),
    ("write.h", "whole = last_block ? c.cell : last_step && !last_tile ?", "whole = last_block ? c.cell : false ?"),
    ("read.h", "if (tiles != 1 || row == 0) {", "if (true) {"),
    ("fetch.h", "issued || is(state.now, BARRIER)", "issued"),
]  # fmt: skip
CASES = [
    ("linear", "uniform", 4, 4, 21, 70),
    ("linear", "grouped", 6, 5, 40, 70),
    ("linear", "hluq", 6, 8, 19, 20),
    ("linear", "table", 4, 4, 18, 11),
    ("qk", "per_head", 4, 4, 21, 70, "per_head"),
    ("av", "uniform", 4, 6, 18, 9),
    ("av", "table", 4, 4, 21, 10),
]


def differs(cases, launch) -> bool:
    """Whether anything that the engine gives is not the golden model's."""
    for seed, shape in enumerate(CASES):
        matmul = cases.make_matmul(*shape[:6], np.random.default_rng(seed), *shape[6:])
        vectors, image = make_vectors(matmul, 6, 73, seed), Image()
        command = launch(matmul, vectors, SMALL, image)
        simulate.run(image, [command.descriptor], SMALL)
        wanted = golden.run(matmul, vectors.left, vectors.right).output
        if (command.read_output(image).view(np.uint32) != wanted.view(np.uint32)).any():
            return True
    rng = np.random.default_rng(5)
    first, second = (cases.make_matmul("linear", family, 4, 4, *size, rng) for family, size in
                     (("uniform", (24, 48)), ("hluq", (48, 20))))  # fmt: skip
    vectors, image = make_vectors(first, 1, 74, 1), Image()
    one = launch(first, vectors, SMALL, image, destination=left_rows(74, 48, second.left, activation="gelu"))
    two = compile_matmul(second, image, SMALL, rows=74, left=one.descriptor.out)
    product = cases.make_matmul("qk", "uniform", 4, 4, 24, 37, rng)
    parts = [
        launch(first, vectors, SMALL, image, destination=head_operands(74, 37, 48, 2, Segment(side, (operand,))))
        for side, operand in (("left", product.left), ("right", product.right))
    ]
    left, right = (part.descriptor.out for part in parts)
    three = compile_matmul(product, image, SMALL, rows=37, batch=4, left=left, right=right)
    simulate.run(image, [command.descriptor for command in (one, two, *parts, three)], SMALL)
    floats = golden.run(first, vectors.left).output
    codes = encode(second.left, gelu(floats))
    heads = floats.reshape(2, 37, 2, 24).swapaxes(1, 2)
    operands = [encode(operand, heads.copy()).reshape(4, 37, 24) for operand in (product.left, product.right)]
    pairs = ((two, golden.run(second, codes).output), (three, golden.run(product, *operands).output))
    return any((command.read_output(image) != wanted).any() for command, wanted in pairs)


def test_the_engine_as_it_is_passes(cases, launch) -> None:
    assert not differs(cases, launch)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text", "faulty"), MUTANTS, ids=[f"{m[0]}: {m[2]}" for m in MUTANTS])
def test_a_fault_is_seen(cases, launch, plant, monkeypatch, name: str, text: str, faulty: str) -> None:
    plant(name, text, faulty)
    built = {}

    def library(config: EngineConfig):
        if config not in built:
            built[config] = build(config)
        return built[config]

    build = simulate.library.__wrapped__
    monkeypatch.setattr(simulate, "library", library)
    try:
        seen = differs(cases, launch)
    except RuntimeError:
        seen = True
    assert seen
