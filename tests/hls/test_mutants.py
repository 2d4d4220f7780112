# SPDX-License-Identifier: Apache-2.0
"""Would the tests see a mistake? Each mutant has one on a line of its own and must give other values, nothing else."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest

from ahcq_plugin.export.codes import encode
from ahcq_plugin.hls import compile_generated, generate
from ahcq_plugin.hls.vectors import make_vectors, quantizer_values

# name -> (layer that shows it, file, text of one line, text instead)
KERNELS = {
    "tail_of_k": ("av", "rows.h", "fold * C::SIMD + i < C::K;", "fold * C::SIMD + i <= C::K;"),
    "uniform_step": ("hluq", "operands.h", "int(code) - C::LOG_LEVELS : 0", "int(code) - C::LOG_LEVELS + 1 : 0"),
    "shift": ("hluq", "operands.h", "C::LOG_LEVELS - 1 - int(code);", "C::LOG_LEVELS - int(code);"),
    "shift_base": ("hluq", "operands.h", "|| is_zero ? C::LOG_LEVELS - 1 :", "|| is_zero ? C::LOG_LEVELS - 2 :"),
    "zero_code": ("hluq", "operands.h", "if (!is_zero) acc[1]", "acc[1]"),
    "weight_order": ("uniform", "linear.h", "word >> (i * C", "word >> ((C::SIMD - 1 - i) * C"),
    "weight_zero": ("uniform", "linear.h", "int(zero_points[t][pe])", "int(zero_points[t][0])"),
    "start_of_group": ("grouped", "linear.h", "starts[t * C::GROUPS + group][pe]", "starts[t * C::GROUPS][pe]"),
    "row_sum": ("qk", "attention.h", "row_sum * zeros<C>::right(head)", "row_sum * zeros<C>::left(head)"),
    "head_of_zeros": ("qk_heads", "attention.h", "head = next_head<C>(head);", "head = 0;"),
    "head_of_scale": ("qk_heads", "dequantize.h", "g, scales.left + head);", "g, scales.left);"),
    "head_of_quantizer": ("qk_heads", "quantize.h", "is_per_head ? head : k", "is_per_head ? 0 : k"),
    "tail_of_right": ("qk", "attention.h", "sum += code;", "sum += codes[i];"),
    "column": ("av", "attention.h", "[n % C::PE][k % C::SIMD] = code", "[n % C::PE][0] = code"),
    "both_zeros": ("av", "attention.h", "- by_left) + both", "- by_left) - both"),
    "integer_to_float": ("table", "dequantize.h", "? float(int32_t(value.to_int()))", "? float(value.to_int() & ~1)"),
    "group_scale": ("grouped", "dequantize.h", "to_float(acc[0]) * scales[g]", "to_float(acc[0]) * scales[0]"),
    "lane_scale": ("hluq", "dequantize.h", "to_float(acc[1]) * scales[1]", "to_float(acc[1]) * scales[0]"),
    "order_of_floats": (
        "table",
        "dequantize.h",
        "const float scaled = whole * scales.weight[n];",
        "const float scaled = sum * scales.weight[n] + scales.offset[n] * scales.weight[n];",
    ),
    "bias": ("uniform", "dequantize.h", "scaled + scales.bias[n]", "scaled + scales.bias[0]"),
    "tie_up": ("uniform", "quantize.h", "rest == 0.5f && odd", "rest == 0.5f"),
    "tie_down": ("grouped", "quantize.h", "rest == -0.5f && odd", "rest == -0.5f"),
    "saturation": ("grouped", "quantize.h", "float(TOP - zero_point)", "float(TOP - zero_point + 1)"),
    "on_a_boundary": (
        "hluq",
        "quantize.h",
        "!(x < boundaries[int(candidate) - 1])",
        "x > boundaries[int(candidate) - 1]",
    ),
}


def entry(text: str, name: str, index: int, change) -> str:
    """``text`` with number ``index`` of the array ``name`` changed."""
    base = re.search(rf"const [\w:]+ {name}\[[^=]*= ", text).end()
    numbers = list(re.finditer(r"-?[\d.]+(?:e[-+]?\d+)?", text[base : text.index(";", base)]))
    number = numbers[index]
    return text[: base + number.start()] + change(number[0]) + text[base + number.end() :]


def plus_one(digits: str) -> str:
    return str(int(digits) + 1)


def next_float(digits: str) -> str:
    return f"{np.nextafter(np.float32(digits), np.float32(9)):.9g}"


# name -> (layer, file, change of the text): mistakes of the generator
GENERATED = {
    "permutation": (
        "grouped",
        "parameters.h",
        lambda text: re.sub(r"(slot\(.*?= \{)(\d+), (\d+)", r"\1\3, \2", text, flags=re.DOTALL),
    ),
    "decode_table": ("av_table", "parameters.h", lambda text: entry(text, "table", 5, plus_one)),
    "boundary": ("table", "parameters.h", lambda text: entry(text, "boundaries", 7, next_float)),
    "rank_code": ("hluq", "parameters.h", lambda text: entry(text, "codes", 3, plus_one)),
    "weight": ("uniform", "weights.h", lambda text: entry(text, "weights", 2, plus_one)),
    "start": ("grouped", "weights.h", lambda text: entry(text, "starts", 4, plus_one)),
}


def disagreement(layer, function) -> int:
    """Accumulators, floats and codes that differ from the golden model; the streams hold what they should."""
    from ahcq_plugin.export import golden

    vectors = make_vectors(layer.matmul, 4, 250, seed=11)
    result, wanted = function.run(vectors.left, vectors.right), golden.run(layer.matmul, vectors.left, vectors.right)
    values = quantizer_values(layer.matmul.left, 600, layer.matmul.k, seed=12)
    if layer.inputs[0].is_per_head:
        values = values.reshape(-1, 2, layer.matmul.k)
    codes = function.quantize("left_quantizer", values)
    return int(
        (result.accumulators != wanted.accumulators).sum()
        + (result.output.view(np.uint32) != wanted.output.view(np.uint32)).sum()
        + (codes != encode(layer.matmul.left, values)).sum()
    )


@pytest.fixture(scope="module")
def layers(cases, tmp_path_factory):
    """name -> (Layer, folder that was generated for it alone)."""
    made = {}
    for name in sorted({case[0] for case in (*KERNELS.values(), *GENERATED.values())}):
        layer = cases.make_layer(name)
        made[name] = layer, generate([layer], tmp_path_factory.mktemp("mutants") / name)
    return made


def compile_changed(cases, layers, name: str, tmp_path, file: str, change):
    layer, original = layers[name]
    folder = tmp_path / "layers"
    shutil.copytree(original, folder)
    path = folder / ("include/ahcq" if file in {case[1] for case in KERNELS.values()} else layer.top) / file
    before = path.read_text(encoding="utf-8")
    after = change(before)
    pairs = zip(before.splitlines(), after.splitlines(), strict=True)
    assert sum(old != new for old, new in pairs) == 1, "a mutant has one changed line"
    path.write_text(after, encoding="utf-8")
    return layer, compile_generated([layer], folder)[layer.top]


def test_without_a_mutation_there_is_no_difference(cases, compiled, layers) -> None:
    assert {name: disagreement(*compiled[name]) for name in layers} == dict.fromkeys(layers, 0)


@pytest.mark.parametrize("mutant", KERNELS)
def test_a_wrong_kernel_gives_wrong_values(cases, layers, tmp_path, mutant: str) -> None:
    name, file, right, wrong = KERNELS[mutant]

    def change(text: str) -> str:
        assert text.count(right) == 1, f"{right!r} must stand in {file} once"
        return text.replace(right, wrong)

    assert disagreement(*compile_changed(cases, layers, name, tmp_path, file, change)) > 0


@pytest.mark.parametrize("mutant", GENERATED)
def test_a_wrong_constant_gives_wrong_values(cases, layers, tmp_path, mutant: str) -> None:
    name, file, change = GENERATED[mutant]
    assert disagreement(*compile_changed(cases, layers, name, tmp_path, file, change)) > 0


def test_no_two_mutants_share_a_line(layers) -> None:
    lines = set()
    folder = next(iter(layers.values()))[1] / "include" / "ahcq"
    for _, file, right, _ in KERNELS.values():
        text = (folder / file).read_text(encoding="utf-8")
        lines.add((file, text[: text.index(right)].count("\n")))
    assert len(lines) == len(KERNELS) >= 12
