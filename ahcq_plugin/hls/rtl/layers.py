# SPDX-License-Identifier: Apache-2.0
"""Generated layers with a constant weight as RTL, beside the golden model.

Rows of codes come in; float32 rows go out, of CAG (grouped) the accumulators: its floats go round from group to group,
which takes more cycles than a tile has beats unless it has many. Products (qk, av) are not among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ahcq_plugin.export import GroupedOperand, SpecError, golden
from ahcq_plugin.export.golden import GoldenResult
from ahcq_plugin.hls.layer import Layer
from ahcq_plugin.hls.render import render
from ahcq_plugin.hls.rtl.clang import Program
from ahcq_plugin.hls.rtl.netlist import Rtl, compile_rtl
from ahcq_plugin.hls.rtl.schedule import ScheduleOptions, cache_folder
from ahcq_plugin.hls.rtl.simulate import RunResult, Simulation, Stalls, build
from ahcq_plugin.hls.vectors import Vectors, make_vectors
from ahcq_plugin.support.files import write_text

TOP = "kernels"
FLOWING, STOPPING = Stalls(), Stalls(idle=0.3, back=0.3, reset_at=60)


def gives_floats(layer: Layer) -> bool:
    """Whether the RTL of ``layer`` ends with floats, not with accumulators."""
    return not isinstance(layer.matmul.left, GroupedOperand)


def compile_layers(
    layers: Mapping[str, Layer], folder: Path, options: ScheduleOptions | None = None, cache: Path | None = None
) -> Rtl:
    """One design with the kernels of ``layers``, whose C++ ``generate`` wrote to ``folder``.

    Args:
        layers: by C++ names that the ports get.
    Raises:
        SpecError: a layer is a product. RtlError: see ``compile_rtl``.
    """
    products = [layer.top for layer in layers.values() if layer.is_product]
    if products:
        raise SpecError(f"products of two run-time operands do not become RTL yet: {', '.join(products)}")
    parts = [dict(name=name, top=layer.top, floats=gives_floats(layer)) for name, layer in layers.items()]
    write_text(render("rtl_layers.cpp.j2", dict(layers=parts)), folder / f"{TOP}.cpp")
    program = Program(folder / f"{TOP}.cpp", (folder / "include", *(folder / layer.top for layer in layers.values())))
    return compile_rtl(program, TOP, options, cache)


def differences(
    simulation: Simulation, layers: Mapping[str, Layer], vectors: Mapping[str, Vectors], stalls: Stalls = FLOWING
) -> dict[str, int]:
    """Numbers of each layer that differ from the golden model in any bit.

    Args:
        vectors: (1, rows, k) codes of each layer, all with the same number of rows.
    """
    rows = {given.left.shape[1] for given in vectors.values()}
    if len(rows) != 1:
        raise ValueError(f"all layers of a design take the same number of rows, got {sorted(rows)}")
    words: dict[str, list[int]] = {"args": [rows.pop()]}
    expected = {}
    for name, layer in layers.items():
        codes = vectors[name].left[0]
        words[f"left_{name}"] = _beats(codes, layer)
        beats = (
            -(-layer.matmul.n // layer.layout.out)
            if gives_floats(layer)
            else layer.layout.tiles * len(layer.layout.group_folds)
        )
        expected[f"out_{name}"] = len(codes) * beats
        if gives_floats(layer):
            words[f"scales_{name}"], words[f"parts_{name}"] = _scales(layer)
    result = simulation.run(words, expected, stalls)
    return {
        name: _different(result, name, layer, golden.run(layer.matmul, vectors[name].left, None))
        for name, layer in layers.items()
    }


def check(layer: Layer, folder: Path, rows: int = 16, options: ScheduleOptions | None = None) -> dict[str, int]:
    """Make RTL of one layer of the generated ``folder`` (into ``<top>/rtl``) and run it on random and directed rows.

    Returns:
        ``different``: numbers that differ from the golden model; ``rows``; ``stages`` of the longest pipeline.
    Raises:
        SpecError, RtlError: see ``compile_layers``.
    """
    rtl = compile_layers({"layer": layer}, folder, options, cache_folder())
    rtl.write(folder / layer.top / "rtl")
    vectors = {"layer": make_vectors(layer.matmul, 1, rows, seed=2)}
    simulation = build(rtl, cache_folder())
    different = sum(
        differences(simulation, {"layer": layer}, vectors, stalls)["layer"] for stalls in (FLOWING, STOPPING)
    )
    return dict(different=different, rows=rows, stages=max(one.stages for one in rtl.scheduled.values()))


def _beats(codes: np.ndarray, layer: Layer) -> list[int]:
    """Words of the beats of (rows, k) codes."""
    simd, bits = layer.options.simd, layer.matmul.left.bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % simd))).reshape(-1, simd)
    return [sum(int(code) << (bits * i) for i, code in enumerate(row)) for row in padded]


def _scales(layer: Layer) -> tuple[list[int], list[int]]:
    """Words of the left scales, and for every ``out`` outputs of weight scales, biases and offsets."""
    layout, n = layer.layout, layer.matmul.n
    left, rest = np.split(layout.scales, [layout.left_scales])
    table = np.zeros((3, layout.tiles * layout.pe), np.float32)
    table[: len(rest) // n, :n] = rest.reshape(-1, n)
    parts = table.reshape(3, -1, layout.out).transpose(1, 0, 2).reshape(-1, 3 * layout.out)
    words = [int.from_bytes(np.ascontiguousarray(row).tobytes(), "little") for row in parts]
    return left.view(np.uint32).tolist(), words


def _different(result: RunResult, name: str, layer: Layer, wanted: GoldenResult) -> int:
    out, n, layout = result.outputs[f"out_{name}"], layer.matmul.n, layer.layout
    if gives_floats(layer):
        bits = out[:, : layout.out].reshape(wanted.output.shape[1], -1)[:, :n]
        return int((bits != wanted.output[0].view(np.uint32)).sum())
    size = next(size for size in (1, 2, 4, 8) if 8 * size >= layer.matmul.accumulator_bits)
    numbers = np.ascontiguousarray(out).view(f"<i{size}")[:, : layout.pe]
    groups = len(layout.group_folds)
    by_tile = numbers.reshape(-1, layout.tiles, groups, layout.pe).transpose(0, 1, 3, 2)
    sums = by_tile.reshape(-1, layout.tiles * layout.pe, groups)
    return int((sums[:, :n] != wanted.accumulators[0]).sum())
