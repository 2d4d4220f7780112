# SPDX-License-Identifier: Apache-2.0
"""The linter sees every fault that the headers once had, and none in the headers as they are."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from ahcq_plugin.hls import generate
from ahcq_plugin.hls.rtl import Program, RtlError, compile_rtl
from ahcq_plugin.hls.rtl.lint import lint

FAULTS = Path(__file__).with_name("faults")
_SPEC = importlib.util.spec_from_file_location("hls_cases", Path(__file__).parents[1] / "cases.py")
cases = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cases)

# fault -> (line, what the message names)
SEEN = {
    "deadlock": (13, "`floats` is filled before"),
    "nest": (11, "the loop of line 14"),
    "recurrence": (32, "several additions to `acc`"),
    "partition": (10, "`tile.acc` at a time"),
    "dependence": (13, "variable = right_sum inter"),
    "dataflow": (15, "inside DATAFLOW"),
}
# fault -> changes that mend it: (text, text instead)
MENDED = {
    "nest": [
        ("            int group = 0;\n            int left = 0;\n", ""),
        ("    int acc = 0;\n", "    int acc = 0, group = 0, left = 0;\n"),
    ],
    "partition": [
        ("    tile_t tile;\n", "    tile_t tile;\n#pragma HLS ARRAY_PARTITION variable = tile.acc complete dim = 0\n"),
    ],
    "dependence": [
        (
            "            const ap_uint<4> code",
            "#pragma HLS DEPENDENCE variable = right_sum inter distance = 40 true\n            const ap_uint<4> code",
        )
    ],
}


def program(name: str) -> Program:
    return Program(FAULTS / f"{name}.cpp")


@pytest.mark.parametrize("fault", SEEN)
def test_the_fault_is_seen_once_at_its_line(fault: str) -> None:
    found = lint(program(fault))
    assert [(one.rule, one.place.line) for one in found] == [(fault, SEEN[fault][0])]
    assert SEEN[fault][1] in found[0].message


@pytest.mark.parametrize("fault", SEEN)
def test_the_flow_refuses_it_with_file_and_line(fault: str) -> None:
    with pytest.raises(RtlError, match=re.escape(f"{fault}.cpp:{SEEN[fault][0]}: {fault}")):
        compile_rtl(program(fault), "top")


@pytest.mark.parametrize("fault", MENDED)
def test_the_mended_fault_is_none(fault: str, tmp_path) -> None:
    text = (FAULTS / f"{fault}.cpp").read_text(encoding="utf-8")
    for wrong, right in MENDED[fault]:
        assert text.count(wrong) == 1
        text = text.replace(wrong, right)
    (tmp_path / "mended.cpp").write_text(text, encoding="utf-8")
    assert lint(Program(tmp_path / "mended.cpp")) == []


@pytest.mark.parametrize("name", ["grouped", "hluq", "qk_heads", "av_table"])
def test_the_kernels_have_no_fault(name: str, tmp_path) -> None:
    layer = cases.make_layer(name)
    folder = generate([layer], tmp_path / "layers")
    main = folder / layer.top / f"{layer.top}.cpp"
    assert [str(one) for one in lint(Program(main, (folder / "include", folder / layer.top)))] == []


def test_arrays_for_ports_have_no_fault(tmp_path) -> None:
    layer = cases.make_layer("uniform")
    folder = generate([layer], tmp_path / "layers")
    main = folder / layer.top / "arrays.cpp"
    quantizer = f"{layer.top}_layer::left_quantizer"
    main.write_text(
        f'#include "{layer.top}.h"\n#include "ahcq/arrays.h"\n'
        f"void top(const float* values, {layer.top}_layer::left_stream& out) {{\n"
        f"    ahcq::quantize_array<{quantizer}, 3>(values, out);\n}}\n",
        encoding="utf-8",
    )
    assert [str(one) for one in lint(Program(main, (folder / "include", folder / layer.top)))] == []
