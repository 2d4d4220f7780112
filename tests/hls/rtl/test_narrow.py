# SPDX-License-Identifier: Apache-2.0
"""FIFOs hold what their writers say and their readers ask, and no bit more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ahcq_plugin.hls.resources import sources
from ahcq_plugin.hls.rtl import Program, cache_folder, compile_rtl
from ahcq_plugin.hls.rtl.narrow import Narrow, narrow
from ahcq_plugin.hls.rtl.simulate import Stalls, build

SOURCE = """#include <hls_stream.h>
#include <stdint.h>
struct word { uint8_t small, meant_for_others; uint16_t sum; int64_t wide; };
template <int N>
void writer(hls::stream<uint32_t>& in, hls::stream<word>& out) {
    while (true) {
#pragma HLS PIPELINE II = 1
        const uint32_t value = in.read();
        word now;
        now.small = value & 7;                                          // 3 bits
        now.meant_for_others = uint8_t(value >> 8);                     // nobody reads it
        now.sum = uint16_t((value & 0xff) + (value >> 8 & 0xff));       // 9 bits
        now.wide = int64_t(uint64_t(int64_t(int32_t(value))) << 52) >> 52;  // 12 bits, the upper ones the sign
        out.write(now);
    }
}
template <int N>
void reader(hls::stream<word>& in, hls::stream<int64_t>& out) {
    while (true) {
#pragma HLS PIPELINE II = 1
        const word now = in.read();
        out.write(now.wide + now.sum * int64_t(now.small));
    }
}
void top(hls::stream<uint32_t>& in, hls::stream<int64_t>& out) {
#pragma HLS DATAFLOW
    hls::stream<word> between("between");
    writer<0>(in, between);
    reader<0>(between, out);
}
"""


def test_a_fifo_holds_no_bit_that_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "top.cpp").write_text(SOURCE, encoding="utf-8")
    rtl = compile_rtl(Program(tmp_path / "top.cpp", (sources("include"),)), "top", cache=cache_folder())
    texts = {name: rtl.files[f"{name}.sv"] for name in rtl.scheduled}
    held = narrow(rtl.design, texts)["between"]
    # the 12 bits of `wide` are 12 of the word; the sum's lowest bits are none of them
    assert len(held.kept) <= 3 + 9 + 12 and len(held.sources) == 128
    values = np.random.default_rng(0).integers(0, 2**32, 500, np.uint32)
    wide = (values.view(np.int32).astype(np.int64) << 52) >> 52
    wanted = wide + ((values & 255) + (values >> 8 & 255)).astype(np.int64) * (values & 7)
    found = build(rtl, cache_folder()).run({"in": values}, {"out": 500}, Stalls(0.2, 0.2)).outputs["out"]
    assert (np.ascontiguousarray(found).view(np.int64)[:, 0] == wanted).all()


@given(st.data())
def test_packed_words_come_out_as_they_were(data: st.DataObject) -> None:
    """The SystemVerilog of both ways, read by Python."""
    size = data.draw(st.integers(1, 40))
    kept = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    places = st.integers(0, len(kept) - 1)
    sources_of = data.draw(st.lists(st.one_of(st.sampled_from("01"), places), min_size=size, max_size=size))
    one, word = (
        Narrow(tuple(kept), tuple(sources_of)),
        data.draw(st.lists(st.sampled_from("01"), min_size=size, max_size=size)),
    )
    held = bits_of_concatenation(one.packed("w"), word)
    assert held == [word[bit] for bit in kept]
    read = bits_of_concatenation(one.unpacked("h"), held)
    assert read == [source if isinstance(source, str) else held[source] for source in sources_of]


def bits_of_concatenation(text: str, word: list[str]) -> list[str]:
    """Bits, lowest first, of ``{w[3:1], {2{1'b0}}, ...}``."""
    found: list[str] = []
    for part in reversed(text[1:-1].split(", ")):
        if part.startswith("{"):
            times, bit = part[1:-2].split("{1'b")
            found += int(times) * [bit]
        else:
            last, first = map(int, part[2:-1].split(":"))
            found += word[first : last + 1]
    return found
