# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (lines of C++, and lines of the translator)
"""Would the tests of RTL see a mistake? Mutants of the translator and of the C++ must give other words, nothing else."""

from __future__ import annotations

import importlib.util
import inspect
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

from ahcq_plugin.hls.rtl import (
    Program,
    RtlError,
    balance,
    cache_folder,
    channels,
    compile_rtl,
    memory,
    process,
    storage,
    values,
)
from ahcq_plugin.hls.rtl.simulate import Stalls, build

_SPEC = importlib.util.spec_from_file_location("rtl_kernels", Path(__file__).with_name("kernels.py"))
kernels = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(kernels)

WORD = kernels.WORD
#: One kernel for each thing that the translator does; every one is in one design.
SOURCE = {
    "sums": f"""    ap_int<24> acc = 0;
    for (int i = 0; i < n; ++i) {{
        const ap_uint<64> a = in.read();
        acc = acc + ap_int<9>(a) - ap_int<7>(a >> 9) + ap_int<8>(a >> 20) + ap_int<6>(a >> 30);
        if (a[40] && acc > -30) out.write({WORD}(acc));
    }}""",
    "memory": f"""    ap_int<11> memory[32];
    for (int i = 0; i < 32; ++i) memory[i] = 3 * i - 40;
    for (int i = 0; i < n; ++i) {{
        const ap_uint<64> a = in.read();
        const ap_int<11> old = memory[ap_uint<5>(a)];
        memory[ap_uint<5>(a >> 5)] = ap_int<11>(a >> 10);
        out.write({WORD}(old + memory[ap_uint<5>(a)]));
    }}""",
    "modify": f"""    ap_uint<20> bins[16];
    for (int i = 0; i < 16; ++i) bins[i] = 7 * i;
    for (int i = 0; i < n; ++i) {{
        const ap_uint<64> a = in.read();
        if (a[20]) bins[ap_uint<4>(a | 12)] += ap_uint<9>(a >> 4);
    }}
    for (int i = 0; i < 16; ++i) out.write({WORD}(bins[i]));""",
    "nest": f"""    for (int row = 0; row < (n >> 3) - 3; ++row) {{
        int last = 5;
        for (int t = 0; t < 2; ++t) {{
            for (int f = 0; f < 5; ++f) {{
                const ap_uint<64> a = in.read();
                last = last * 3 + int(a >> 33);
                if (f == 4) out.write({WORD}(ap_int<32>(last + t)));
            }}
        }}
    }}""",
    "window": f"""    ap_uint<16> window[8];
#pragma HLS ARRAY_PARTITION variable = window complete
    for (int i = 0; i < 8; ++i) {{
#pragma HLS UNROLL
        window[i] = 9 * i;
    }}
    for (int i = 0; i < n; ++i) {{
        const ap_uint<64> a = in.read();
        if (a[3]) window[ap_uint<3>(a)] = ap_uint<16>(a >> 8);
        out.write({WORD}(window[ap_uint<3>(a >> 30)] + window[1]));
    }}""",
    "reals": f"""    for (int i = 0; i < n; ++i) {{
        const ap_uint<64> a = in.read();
        const float f = float(int(a) >> 9), g = float(ap_int<20>(a >> 20).to_int()) * 0.125f;
        const float sum = f * g - g;
        out.write({WORD}(as_bits(sum < f ? sum : -f) ^ ap_uint<32>(int(g))));
    }}""",
    "narrow": f"""    int memory[32];
    for (int i = 0; i < n; ++i) {{
        const ap_uint<64> a = in.read();
        memory[i & 31] = int(a.to_uint64()) >> 20;
        if (i > 40) out.write({WORD}(ap_int<32>(memory[ap_uint<5>(a >> 40)])));
    }}""",
    "held": f"""    const ap_uint<64> first = in.read();
    for (int i = 1; i < n; ++i) {{
        const ap_uint<64> a = in.read();
        out.write({WORD}(a + ap_uint<20>(first >> 9)));
    }}""",
    "wide": """#pragma HLS DATAFLOW
    hls::stream<ap_uint<100> > middle;
    widen(in, n, middle);
    narrow_again(middle, n, out);""",
}
#: What bodies call: two processes with a wide stream between them.
HELPERS = f"""
void widen(hls::stream<{WORD}>& in, int n, hls::stream<ap_uint<100> >& out) {{
    for (int i = 0; i < n; ++i) {{
        const ap_uint<64> a = in.read();
        out.write((ap_uint<100>(a) << 36) | ap_uint<100>(a >> 30));
    }}
}}
void narrow_again(hls::stream<ap_uint<100> >& in, int n, hls::stream<{WORD}>& out) {{
    for (int i = 0; i < n; ++i) {{
        const ap_uint<100> b = in.read();
        out.write({WORD}(b >> 40) ^ {WORD}(b));
    }}
}}
"""
# name -> (module, function, text of the function, text instead): one word of the translator
TRANSLATOR = {
    "subtracted_term": (balance, "_terms", 'minus != (node.op == "sub")', 'minus and (node.op == "sub")'),
    "sum_of_terms": (balance, "_tree", "words = pairs + words[2 * len(pairs) :]", "words = pairs"),
    "write_address": (channels, "Channels.ram", "write, target, data]", "write, address, data]"),
    "forwarded_word": (channels, "Channels.ram", 'graph.select(same, last["data"], word)', "word"),
    "forwarded_valid": (channels, "Channels.ram", 'graph.both(last["valid"], ', "graph.both(graph.one, "),
    "earlier_write": (channels, "Channels.ram", "for condition, index, written in earlier:", "for condition, index, written in ():"),
    "write_enable": (channels, "Channels.ram", "graph.concat([read, address, write,", "graph.concat([read, address, read,"),
    "sign_of_a_word": (storage, "Storage.access", "8 * column.size, column.sign)", "8 * column.size, False)"),
    "constant_index": (storage, "Storage._index", "graph.literal(bits, word)", "graph.literal(bits, 0)"),
    "register_order": (storage, "Storage._chain", "self.graph.select(condition, now, before)", "now"),
    "untaken_branch": (process, "_Translation._leave", 'graph.both(active, graph.node("not", 1, [condition])))', "graph.both(active, condition))"),
    "start_of_a_phi": (process, "_Translation._phis", "graph.select(self.edges[label, cut], now, element.next)", "element.next"),
    "next_place": (process, "_Translation.process", "graph.literal(bits, index), following)", "graph.literal(bits, 0), following)"),
    "condition_of_a_push": (process, "_Translation._stream_call", "channel.cases.append((self.active[name],", "channel.cases.append((graph.one,"),
    "narrow_word": (memory, "Memories._stored", "max(1, kind.bits - made.args[1][1].value), True", "max(1, kind.bits - made.args[1][1].value - 1), True"),
    "held_value": (process, "_Translation.process", "graph.select(self.active[self.home[value]], self.values[value], element.read)", "self.values[value]"),
    "part_of_a_word": (process, "_Translation._stream_call", "graph.slice(word, start, width), 64)", "graph.slice(word, 0, width), 64)"),
    "signed_extension": (values, "Values.compute", 'kind.bits, op == "sext")', "kind.bits, False)"),
    "difference_of_floats": (values, "Values.compute", "self.negative(operand(1))", "operand(1)"),
    "order_of_a_comparison": (values, "Values._compare", 'self.call("greater", 1, b, a)', 'self.call("greater", 1, a, b)'),
}  # fmt: skip
# name -> (kernel, text, text instead): C++
WRITTEN = {
    "one_more_turn": ("nest", "f < 5;", "f < 6;"),
    "width": ("sums", "ap_int<7>(a >> 9)", "ap_uint<7>(a >> 9)"),
    "address": ("memory", "ap_uint<5>(a >> 5)", "ap_uint<5>(a >> 4)"),
    "start": ("modify", "= 7 * i;", "= 6 * i;"),
    "condition": ("window", "if (a[3])", "if (a[4])"),
    "constant": ("reals", "0.125f", "0.25f"),
}


def program(bodies: dict[str, str], folder: Path) -> str:
    made = [
        f"\nvoid {name}(hls::stream<{WORD}>& in, int n, hls::stream<{WORD}>& out) {{\n{body}\n}}\n"
        for name, body in bodies.items()
    ]
    return kernels.program([HELPERS, *made], list(bodies))


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """(words that go in, words that g++ says come out), by kernel."""
    folder = tmp_path_factory.mktemp("reference")
    rng = np.random.default_rng(3)
    words = {name: rng.integers(0, 2**64, 120, np.uint64) for name in SOURCE}
    return words, kernels.reference(folder, program(SOURCE, folder), list(SOURCE), words)


def is_equal(bodies: dict[str, str], wanted, folder: Path, cache: Path) -> bool:
    """Whether the RTL gives all words, with and without stalls."""
    words, results = wanted
    (folder / "kernels.cpp").write_text(program(bodies, folder), encoding="utf-8")
    simulation = build(compile_rtl(Program(folder / "kernels.cpp"), "top", cache=cache_folder(), faults=True), cache)
    inputs = {f"in_{name}": words[name].view(np.uint32).reshape(-1, 2) for name in bodies}
    expected = {f"out_{name}": len(results[name]) for name in bodies}
    for stalls in (Stalls(), Stalls(0.3, 0.3, seed=4)):
        try:
            outputs = simulation.run({"args": [120], **inputs}, expected, stalls, limit=20_000).outputs
        except RtlError:
            return False  # too few words: they are not the same
        for name in bodies:
            if not np.array_equal(np.ascontiguousarray(outputs[f"out_{name}"]).view(np.uint64).ravel(), results[name]):
                return False
    return True


@pytest.mark.slow
def test_without_a_mutation_all_words_are_equal(wanted, tmp_path) -> None:
    assert is_equal(SOURCE, wanted, tmp_path, tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("mutant", WRITTEN)
def test_wrong_cpp_gives_other_words(mutant: str, wanted, tmp_path) -> None:
    kernel, right, wrong = WRITTEN[mutant]
    assert SOURCE[kernel].count(right) == 1
    assert not is_equal({**SOURCE, kernel: SOURCE[kernel].replace(right, wrong)}, wanted, tmp_path, tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("mutant", TRANSLATOR)
def test_a_wrong_translator_gives_other_words(mutant: str, wanted, tmp_path, monkeypatch) -> None:
    module, name, right, wrong = TRANSLATOR[mutant]
    owner, function = module, getattr(module, name.split(".")[0])
    if "." in name:
        owner, function = function, getattr(function, name.split(".")[1])
    text = textwrap.dedent(inspect.getsource(function))
    flat = re.sub(r"\s+", " ", text)
    assert flat.count(right) >= 1, f"{right!r} must stand in {name}"
    pattern = r"\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", right)))
    changed, count = re.subn(pattern, lambda _: wrong, text, count=1)
    assert count == 1
    scope = dict(vars(module))
    exec(compile("from __future__ import annotations\n" + changed, module.__file__, "exec"), scope)  # our own text
    monkeypatch.setattr(owner, name.split(".")[-1], scope[name.split(".")[-1]])
    try:
        equal = is_equal(SOURCE, wanted, tmp_path, tmp_path / "cache")
    except (RtlError, KeyError, ValueError) as error:
        pytest.fail(f"the mutant must give other words, not an error: {error}")
    assert not equal
