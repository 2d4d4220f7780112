# SPDX-License-Identifier: Apache-2.0
"""The kernels of hls/include as RTL: rows in, accumulators or floats out, equal to the golden model bit for bit."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from ahcq_plugin.export import golden
from ahcq_plugin.hls import HLSOptions, Layer, generate
from ahcq_plugin.hls.rtl import Program, cache_folder, compile_rtl
from ahcq_plugin.hls.rtl.simulate import RunResult, Simulation, Stalls, build
from ahcq_plugin.hls.vectors import make_vectors

_SPEC = importlib.util.spec_from_file_location("hls_cases", Path(__file__).parents[1] / "cases.py")
cases = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cases)

OPTIONS = HLSOptions(pe=4, simd=4, out=1)
STALLS = (Stalls(), Stalls(idle=0.5), Stalls(back=0.5, seed=2), Stalls(0.3, 0.3, 90, 3))
FAMILIES = ("uniform", "grouped", "hluq", "table")

PROCESSES = """
namespace {name} {{
using namespace {top}_layer;
struct part_t {{
    float weight[config::OUT], bias[config::OUT], offset[config::OUT];
}};
void send(hls::stream<ahcq::code_axis<config> >& left, int rows, hls::stream<ahcq::fold_t<config> >& out) {{
    ahcq::send_rows<config>(left, 1, rows, out);
}}
void multiply(hls::stream<ahcq::fold_t<config> >& in, int rows, hls::stream<ahcq::tile_t<config> >& out) {{
    ahcq::multiply_accumulate<config>(in, rows, weights, zero_points, starts, out);
}}
void finish(
    hls::stream<ahcq::tile_t<config> >& in,
    int rows,
    hls::stream<float>& left,
    hls::stream<part_t>& parts,
    hls::stream<ahcq::float_axis<config> >& out) {{
    ahcq::scales_t<config> scales;
#pragma HLS ARRAY_PARTITION variable = scales.left complete
    for (int i = 0; i < config::LEFT_SCALES; ++i) scales.left[i] = left.read();
    for (int beat = 0; beat < config::TILES * config::PE / config::OUT; ++beat) {{
        const part_t part = parts.read();
        for (int i = 0; i < config::OUT; ++i) {{
#pragma HLS UNROLL
            scales.weight[beat * config::OUT + i] = part.weight[i];
            scales.bias[beat * config::OUT + i] = part.bias[i];
            scales.offset[beat * config::OUT + i] = part.offset[i];
        }}
    }}
    ahcq::dequantize_tiles<config>(in, 1, rows, scales, out);
}}
}}  // namespace {name}
"""


def top_source(layers: dict[str, Layer], floats: set[str]) -> str:
    """A top with the three kernels of every layer; those not in ``floats`` end with their accumulators."""
    ports, body = [], []
    for name, layer in layers.items():
        config = f"{layer.top}_layer::config"
        ports.append(f"hls::stream<ahcq::code_axis<{config}> >& left_{name}")
        body.append(f"    hls::stream<ahcq::fold_t<{config}> > folds_{name};")
        body.append(f"#pragma HLS STREAM variable = folds_{name} depth = 4")
        body.append(f"    {name}::send(left_{name}, rows, folds_{name});")
        if name in floats:
            ports += [f"hls::stream<float>& scales_{name}", f"hls::stream<{name}::part_t>& parts_{name}"]
            ports.append(f"hls::stream<ahcq::float_axis<{config}> >& out_{name}")
            body.append(f"    hls::stream<ahcq::tile_t<{config}> > tiles_{name};")
            body.append(f"    {name}::multiply(folds_{name}, rows, tiles_{name});")
            body.append(f"    {name}::finish(tiles_{name}, rows, scales_{name}, parts_{name}, out_{name});")
        else:
            ports.append(f"hls::stream<ahcq::tile_t<{config}> >& out_{name}")
            body.append(f"    {name}::multiply(folds_{name}, rows, out_{name});")
    includes = "".join(f'#include "{layer.top}/weights.h"\n' for layer in layers.values())
    processes = "".join(PROCESSES.format(name=name, top=layer.top) for name, layer in layers.items())
    joined = ",\n    ".join(["int rows", *ports])
    return f"{includes}{processes}\nvoid kernels(\n    {joined}) {{\n#pragma HLS DATAFLOW\n" + "\n".join(body) + "\n}\n"


def beats_of(codes: np.ndarray, layer: Layer) -> list[int]:
    """Words of the beats of (rows, k) codes: the data lies lowest, the rest of a beat is ones."""
    simd, bits = layer.options.simd, layer.matmul.left.bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % simd))).reshape(-1, simd)
    return [sum(int(code) << (bits * i) for i, code in enumerate(row)) for row in padded]


def parts_of_scales(layer: Layer) -> tuple[list[int], list[int]]:
    """Left scales, and for every ``out`` outputs weight scales, biases and offsets, as words."""
    layout, n = layer.layout, layer.matmul.n
    left, rest = np.split(layout.scales, [layout.left_scales])
    table = np.zeros((3, layout.tiles * layout.pe), np.float32)
    table[: len(rest) // n, :n] = rest.reshape(-1, n)
    parts = table.reshape(3, -1, layout.out).transpose(1, 0, 2).reshape(-1, 3 * layout.out)
    return left.view(np.uint32).tolist(), [
        int.from_bytes(np.ascontiguousarray(row).tobytes(), "little") for row in parts
    ]


def run(
    simulation: Simulation, layers: dict[str, Layer], floats: set[str], rows: int, stalls: Stalls
) -> dict[str, int]:
    """Differences from the golden model for every layer."""
    words: dict[str, list[int]] = {"args": [rows]}
    expected, vectors = {}, {}
    for name, layer in layers.items():
        layout = layer.layout
        vectors[name] = make_vectors(layer.matmul, 1, rows, seed=5).left
        words[f"left_{name}"] = beats_of(vectors[name][0], layer)
        expected[f"out_{name}"] = rows * layout.tiles * len(layout.group_folds)
        if name in floats:
            words[f"scales_{name}"], words[f"parts_{name}"] = parts_of_scales(layer)
            expected[f"out_{name}"] = rows * -(-layer.matmul.n // layout.out)
    result = simulation.run(words, expected, stalls)
    return {
        name: _different(result, name, layer, golden.run(layer.matmul, vectors[name], None), name in floats)
        for name, layer in layers.items()
    }


def _different(result: RunResult, name: str, layer: Layer, wanted, is_float: bool) -> int:
    out, n, layout = result.outputs[f"out_{name}"], layer.matmul.n, layer.layout
    if is_float:
        bits = out[:, : layout.out].reshape(wanted.output.shape[1], -1)[:, :n]
        return int((bits != wanted.output[0].view(np.uint32)).sum())
    size = 8 * max(1, 2 ** int(np.ceil(np.log2(layer.matmul.accumulator_bits / 8))))
    numbers = np.ascontiguousarray(out).view(f"<i{size // 8}")[:, : layout.pe]
    groups = len(layout.group_folds)
    sums = (
        numbers.reshape(-1, layout.tiles, groups, layout.pe)
        .transpose(0, 1, 3, 2)
        .reshape(-1, layout.tiles * layout.pe, groups)
    )
    return int((sums[:, :n] != wanted.accumulators[0]).sum())


def built(layers: dict[str, Layer], floats: set[str], folder: Path) -> Simulation:
    generate(list(layers.values()), folder)
    (folder / "kernels.cpp").write_text(top_source(layers, floats), encoding="utf-8")
    program = Program(folder / "kernels.cpp", (folder / "include", folder))
    rtl = compile_rtl(program, "kernels", cache=cache_folder())
    assert not any("import" in text or "DPI" in text for text in rtl.files.values())
    return build(rtl, cache_folder())


def test_rows_through_all_kernels_are_equal(tmp_path) -> None:
    layers = {name: dataclasses.replace(cases.make_layer(name), options=OPTIONS) for name in FAMILIES}
    floats = set(FAMILIES) - {"grouped"}
    simulation = built(layers, floats, tmp_path / "layers")
    for stalls in STALLS:
        assert run(simulation, layers, floats, 12, stalls) == dict.fromkeys(FAMILIES, 0), stalls


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_100_000_dot_products_a_family_are_equal(tmp_path, bits: int) -> None:
    shapes = {name: ("linear", name, bits, bits, 21, 15) for name in FAMILIES}
    layers = {
        name: dataclasses.replace(cases.make_layer(name, shape), options=HLSOptions(pe=8, simd=4, out=4))
        for name, shape in shapes.items()
    }
    floats = set(FAMILIES) - {"grouped"}
    simulation = built(layers, floats, tmp_path / "layers")
    for stalls in STALLS:
        assert run(simulation, layers, floats, -(-100_000 // 15), stalls) == dict.fromkeys(FAMILIES, 0), stalls
