# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (lines of C++)
"""What is outside the subset, or cannot run at II = 1, is an error with file, line and reason; so is a missing tool."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from ahcq_plugin.hls.rtl import Program, RtlError, ToolError, clang, compile_rtl

HEAD = "#include <ap_int.h>\n#include <hls_stream.h>\ntypedef hls::stream<int> s;\n"
# name -> (C++ from line 4 on, line of the error, words of the message)
REFUSED = {
    "array_argument": (
        "void top(const int* a, s& out) {\n    out.write(a[3]);\n}",
        5,
        "`a` is an array: pass its words through",
    ),
    "array_chosen": (
        "void top(s& in, s& out) {\n    int a[99], b[99];\n    for (int i = 0; i < 99; ++i) a[i] = b[i] = i;\n"
        "    int* p = in.read() ? a : b;\n    for (int i = 0; i < 99; ++i) out.write(p[i]);\n}",
        8,
        "an address that is chosen at run time",
    ),
    "loop_in_pipeline": (
        "void top(s& in, int n, s& out) {\n    for (int i = 0; i < n; ++i) {\n#pragma HLS PIPELINE II = 1\n"
        "        int sum = 0;\n        for (int j = 0; j < n; ++j) sum += in.read() * j;\n        out.write(sum);\n    }\n}",
        8,
        "loop not unrolled",
    ),
    "stream_twice": (
        "void top(s& in, int n, s& out) {\n    for (int i = 0; i < n; ++i) {\n#pragma HLS PIPELINE II = 1\n"
        "        const int a = in.read();\n        out.write(a - in.read());\n    }\n}",
        5,
        "the stream `in` is used twice in a turn of this loop, at .*:7 and .*:8",
    ),
    "ram_twice": (
        "void top(s& in, int n, s& out) {\n    int memory[256];\n    for (int i = 0; i < n; ++i) {\n#pragma HLS PIPELINE II = 1\n"
        "        const int a = in.read();\n        memory[a & 255] = i;\n        out.write(memory[a >> 24 & 255] + memory[a >> 3 & 255]);\n    }\n}",
        6,
        "the array `memory` is used twice in a turn",
    ),
    "several_loops": (
        "void top(s& in, s& out) {\n    const int n = in.read();\n    int table[16], left = 16, i = 0, data = 0;\n    bool more = true;\n"
        "    while (more) {\n#pragma HLS PIPELINE II = 1\n        if (left != 0 || i % 2 == 0) data = in.read();\n        if (left != 0) {\n"
        "            table[left % 16] = data;\n            --left;\n        } else {\n            out.write(data + table[i % 16]);\n"
        "            const bool ends = i + 1 == n;\n            i = ends ? 0 : i + 1;\n            if (ends) left = 16;\n            more = data != 0;\n"
        "        }\n    }\n}",
        8,
        "the compiler made 2 loops of this one",
    ),
    "float_division": (
        "void top(s& in, s& out) {\n    const float x = in.read();\n    out.write(int(x / 3.7f));\n}",
        6,
        "`fdiv`",
    ),
    "returns": ("int top(s& in) {\n    return in.read();\n}", 5, "returns a value"),
    "signs": (
        "void top(s& in, s& out) {\n    const ap_uint<9> x = in.read();\n    out.write(x / 3);\n}",
        0,
        "division of a signed",
    ),
    "stream_unread": (
        "void one(s& in, s& out) {\n    out.write(in.read());\n}\nvoid top(s& in) {\n#pragma HLS DATAFLOW\n    s a;\n"
        "    one(in, a);\n}",
        9,
        "the stream `a` is never read",
    ),
    "expression": (
        "void one(s& in, int n, s& out) {\n    for (int i = 0; i < n; ++i) out.write(in.read());\n}\n"
        "void top(s& in, int n, s& out) {\n#pragma HLS DATAFLOW\n    one(in, 3 * n, out);\n}",
        9,
        "an expression .* inside a DATAFLOW body",
    ),
}


def source(tmp_path, body: str) -> Program:
    path = tmp_path / "design.cpp"
    path.write_text(f"{HEAD}{body}\n", encoding="utf-8")
    return Program(path)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_at_its_line(name: str, tmp_path) -> None:
    body, line, words = REFUSED[name]
    with pytest.raises(RtlError) as error:
        compile_rtl(source(tmp_path, body), "top", faults=True)
    assert re.search(words, str(error.value)), str(error.value)
    assert not line or f"design.cpp:{line}:" in str(error.value), str(error.value)


def test_a_circle_that_does_not_fit_is_named(tmp_path) -> None:
    body = """void top(hls::stream<float>& in, int n, hls::stream<float>& out) {
    float decayed = 0;
    for (int i = 0; i < n; ++i) {
#pragma HLS PIPELINE II = 1
        const float x = in.read();
        decayed = decayed * 0.75f
            + x;
        out.write(decayed);
    }
}"""
    with pytest.raises(
        RtlError, match=r"II = 1 is impossible for the process `top_process`.*\n +`decayed .*:9, .*:10 \(weight"
    ):
        compile_rtl(source(tmp_path, body), "top")


def test_a_top_that_is_not_there_is_an_error_with_what_is_there(tmp_path) -> None:
    with pytest.raises(RtlError, match="`other` is there 0 times; functions: top"):
        compile_rtl(source(tmp_path, "void top(s& in, s& out) {\n    out.write(in.read());\n}"), "other")


def test_a_missing_clang_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolError, match=re.escape("`ziglang` holds: `pip install ahcq_plugin[rtl]`")):
        clang.find_clang()


def test_a_memory_of_a_process_may_be_called_as_another_process(tmp_path) -> None:
    """`hold` has a memory `lane`, and `hold_lane` is a process."""
    body = (
        "void hold(s& in, s& out) {\n    int lane[99];\n    for (int i = 0; i < 99; ++i) lane[i] = in.read();\n"
        "    for (int i = 0; i < 99; ++i) out.write(lane[98 - i]);\n}\n"
        "void hold_lane(s& in, s& out) {\n    out.write(in.read() + 1);\n}\n"
        "void top(s& in, s& out) {\n#pragma HLS DATAFLOW\n    s middle;\n    hold(in, middle);\n    hold_lane(middle, out);\n}"
    )
    text = compile_rtl(source(tmp_path, body), "top").files["top.sv"]
    instances = re.findall(r"^  (?:\) |\w+ )(\w+) \($", text, re.MULTILINE)
    assert "hold_lane" in instances and len(set(instances)) == len(instances)


def test_a_comment_after_a_pragma_is_none_of_its_options(tmp_path) -> None:
    body = (
        "void one(s& in, s& out) {\n    out.write(in.read());\n}\n"
        "void top(s& in, s& out) {\n#pragma HLS DATAFLOW // here\n    s middle;\n"
        "#pragma HLS STREAM variable = middle depth = 5 // as deep as needed\n    one(in, middle);\n    one(middle, out);\n}"
    )
    assert [fifo.depth for fifo in compile_rtl(source(tmp_path, body), "top").design.fifos] == [5]


def test_an_index_that_is_put_together_of_bytes_stays_within_its_part_of_an_array(tmp_path) -> None:
    """The high byte of `place` has a stride of 8192 bytes, more than a part of `memory` has."""
    body = """struct beat { unsigned word[8]; };
struct load { beat data; unsigned short place; unsigned char part; bool last, final; };
struct turn { unsigned short places, left, right; unsigned char word, lanes; };
void top(hls::stream<load>& in, hls::stream<turn>& ask, hls::stream<unsigned> (&out)[2]) {
    beat memory[2][40];
#pragma HLS ARRAY_PARTITION variable = memory complete dim = 1
    bool more = true;
    while (more) {
#pragma HLS PIPELINE II = 1
        const load now = in.read();
        const turn then = ask.read();
        for (int i = 0; i < 2; ++i) {
#pragma HLS UNROLL
            if (now.part == i) memory[i][(now.last ? 20 : 0) + now.place] = now.data;
            const beat found = memory[i][(now.last ? 0 : 20) + then.left];
            out[i].write(found.word[then.word]);
        }
        more = !now.final;
    }
}"""
    (process,) = compile_rtl(source(tmp_path, body), "top", faults=True).design.processes.values()
    assert [(ram.depth, ram.bits) for ram in process.rams] == [(40, 256), (40, 256)]


def test_a_path_from_the_folder_one_is_in(tmp_path, monkeypatch):
    """Clang runs elsewhere."""
    (tmp_path / "cpp").mkdir()
    (tmp_path / "cpp" / "one.h").write_text("#define ONE 1\n")
    (tmp_path / "cpp" / "top.cpp").write_text('#include "one.h"\nint top() { return ONE; }\n')
    monkeypatch.chdir(tmp_path)
    program = Program(Path("cpp/top.cpp"), (Path("cpp"),))
    assert program.syntax_tree()["kind"] == "TranslationUnitDecl" and any(
        "top" in name for name in program.module().functions
    )
