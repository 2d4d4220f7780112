# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (lines of C++)
"""Random kernels of the subset of docs/hls_rtl.md, and what g++ makes of them with the ap_types headers."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import numpy as np

from ahcq_plugin.hls.csim import compile_cpp
from ahcq_plugin.hls.resources import ap_types

HEAD = """#include <ap_int.h>
#include <hls_stream.h>
#include <stdint.h>
static float as_float(uint32_t bits) {
    union { uint32_t bits; float number; } both;
    both.bits = bits;
    return both.number;
}
static uint32_t as_bits(float number) {
    union { uint32_t bits; float number; } both;
    both.number = number;
    return both.bits;
}
"""
#: The words of every stream of a kernel.
WORD = "ap_uint<64> "


def integer(rng: random.Random, depth: int) -> str:
    """An expression of `a` (ap_uint<64>), `b` (ap_int<13>), `c` (int), `d` (uint8_t) and the turn `i`."""
    if depth == 0 or rng.random() < 0.1:
        return rng.choice(
            ["a", "b", "ap_int<32>(c)", "ap_uint<8>(d)", f"ap_int<9>({rng.randint(-256, 255)})", "ap_int<32>(i)"]
        )
    x, y = integer(rng, depth - 1), integer(rng, depth - 1)
    width = rng.choice([1, 2, 3, 7, 8, 12, 16, 21, 31, 32, 33, 40, 63, 64])
    kind = f"ap_{rng.choice(['int', 'uint'])}<{width}>"
    form = rng.randrange(12)
    if form < 5:
        return f"{kind}({x} {rng.choice(['+', '-', '*', '&', '|', '^'])} {y})"
    if form == 5:
        return f"({x} {rng.choice(['<', '>', '<=', '>=', '==', '!='])} {y} ? {kind}({x}) : {kind}({y}))"
    if form == 6:
        return f"{kind}({kind}({x}) {rng.choice(['<<', '>>'])} {rng.randrange(width)})"
    if form == 7:
        high = rng.randrange(width)
        return f"ap_uint<{high + 1}>(ap_uint<{width}>({x}).range({high}, {rng.randint(0, high)}))"
    if form == 8:
        return f"{kind}(~{kind}({x}))"
    if form == 9:
        return f"{kind}(-{kind}({x}))"
    if form == 10:
        return f"{kind}({kind}({x}) {rng.choice(['/', '%'])} {kind.split('<')[0]}<7>({rng.choice([3, 5, 7, 16, 31])}))"
    return f"ap_int<32>(({x}).to_int() {rng.choice(['+', '-', '^'])} int({y}))"


def floating(rng: random.Random, depth: int) -> str:
    """A float expression of `f`, `g` and the numbers of ``integer``; without subnormals and divisions."""
    if depth == 0:
        return rng.choice(
            ["f", "g", "float(c)", "float(d)", "float(b.to_int())", f"{rng.choice([0.5, 3.25, -1.7, 1e3])}f"]
        )
    x, y = floating(rng, depth - 1), floating(rng, depth - 1)
    form = rng.randrange(7)
    if form < 4:
        return f"({x} {rng.choice(['+', '-', '*'])} {y})"
    if form == 4:
        return f"({x} {rng.choice(['<', '>', '<=', '>=', '==', '!='])} {y} ? {x} : {y})"
    if form == 5:
        return f"(-({x}))"  # a literal may be negative
    return f"float(int(({x} > 1e6f || {x} < -1e6f) ? 1.5f : {x}))"


def kernel(rng: random.Random, name: str) -> str:
    """C++ of a process ``name(in, n, out)``: it reads n words and may write any number."""
    bits = rng.choice([9, 16, 24, 32])
    expression, other = integer(rng, 3), integer(rng, 2)
    body = {
        "stream": f"out.write({WORD}({expression}));",
        "reduce": f"acc = ap_int<{bits}>(acc + {expression});\n        if ((i & 3) == 3 || acc > 5) out.write({WORD}(acc));",
        "histogram": f"table[ap_uint<4>({other})] += {expression};\n        out.write({WORD}(table[ap_uint<4>(a)]));",
        "ram": f"memory[ap_uint<6>({other})] = {expression};\n        out.write({WORD}(memory[ap_uint<6>(a >> 3)]));",
        "before": f"const ap_uint<{bits}> old = memory[ap_uint<6>(a)];\n        memory[ap_uint<6>({other})] = {expression};"
        f"\n        out.write({WORD}(old));",
        "modify": f"ap_uint<{bits}>& at = memory[ap_uint<6>({other})];\n        at = at + ap_uint<{bits}>({expression});"
        f"\n        if (a[1]) out.write({WORD}(at));",
        "registers": "window[ap_uint<3>(c)] = a;\n        ap_uint<64> sum = 0;\n        for (int k = 0; k < 8; ++k) sum = sum + window[k];\n"
        "        out.write(sum ^ window[d & 7]);",
        "float": f"const float f = as_float(0x3f000000u | (d << 13)), g = as_float(0xc1000000u ^ (uint32_t(c) << 8 >> 4));\n"
        f"        const float x = {floating(rng, 2)};\n        out.write({WORD}(as_bits(x)));",
        "branch": f"if (a[0]) out.write({WORD}({other}));\n        else if (a[2]) {{ acc = acc + 1; }}\n        else out.write({WORD}(acc));"
        f"\n        if (a[3]) acc = ap_int<{bits}>({expression});",
        "pair": f"pair_t pair;\n        pair.low = {expression};\n        pair.parts[0] = b;\n        pair.parts[1] = c;\n"
        "        keep[i & 15] = pair;\n        const pair_t now = keep[d & 15];\n"
        f"        out.write({WORD}(now.low + now.parts[0] + now.parts[1]));",
    }
    shape = rng.choice(sorted(body))
    # RAMs are undefined until they are written; registers too
    clear = {
        "histogram": f"    ap_uint<{bits}> table[16];\n    for (int i = 0; i < 16; ++i) table[i] = i;\n",
        "registers": "    ap_uint<64> window[8];\n#pragma HLS ARRAY_PARTITION variable = window complete\n"
        "    for (int i = 0; i < 8; ++i) {\n#pragma HLS UNROLL\n        window[i] = 0;\n    }\n",
        "pair": "    pair_t keep[16];\n    for (int i = 0; i < 16; ++i) {\n        keep[i].low = i;\n        keep[i].parts[0] = -i;\n"
        "        keep[i].parts[1] = 3 * i;\n    }\n",
    }.get(shape, "")
    if shape in ("ram", "before", "modify"):
        clear = f"    ap_uint<{bits}> memory[64];\n    for (int i = 0; i < 64; ++i) memory[i] = i * 5;\n"
    return f"""
void {name}(hls::stream<{WORD}>& in, int n, hls::stream<{WORD}>& out) {{
    ap_int<{bits}> acc = 0;
{clear}    for (int i = 0; i < n; ++i) {{
        const ap_uint<64> a = in.read();
        const ap_int<13> b = ap_int<13>(a >> 7);
        const int c = int(a >> 20);
        const uint8_t d = uint8_t(a >> 50);
        {body[shape]}
    }}
    if (acc != 0) out.write({WORD}(acc));
}}
"""


PAIR = "struct pair_t {\n    ap_uint<24> low;\n    ap_int<20> parts[2];\n};\n"


def program(kernels: list[str], names: list[str]) -> str:
    """A top with one process for each kernel."""
    ports = ",\n    ".join(f"hls::stream<{WORD}>& in_{name}, hls::stream<{WORD}>& out_{name}" for name in names)
    calls = "\n".join(f"    {name}(in_{name}, n, out_{name});" for name in names)
    return f"{HEAD}{PAIR}{''.join(kernels)}\nvoid top(int n, {ports}) {{\n#pragma HLS DATAFLOW\n{calls}\n}}\n"


def reference(folder: Path, source: str, names: list[str], words: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the kernels of ``source`` write, compiled by g++: uint64 words for each name."""
    streams = "".join(f"    hls::stream<{WORD}> in_{name}, out_{name};\n" for name in names)
    fill = "".join(f"    load(in_{name});\n" for name in names)
    drain = "".join(f"    store(out_{name});\n" for name in names)
    ports = ", ".join(f"in_{name}, out_{name}" for name in names)
    main = f"""#include <cstdio>
#include "kernels.cpp"
static void load(hls::stream<{WORD}>& stream) {{
    uint64_t count, word;
    if (fread(&count, 8, 1, stdin) != 1) return;
    for (uint64_t i = 0; i < count && fread(&word, 8, 1, stdin) == 1; ++i) stream.write(word);
}}
static void store(hls::stream<{WORD}>& stream) {{
    uint64_t count = stream.size(), word;
    fwrite(&count, 8, 1, stdout);
    while (!stream.empty()) {{
        word = stream.read().to_uint64();
        fwrite(&word, 8, 1, stdout);
    }}
}}
int main(int, char** argv) {{
{streams}{fill}    top(atoi(argv[1]), {ports});
{drain}}}
"""
    (folder / "kernels.cpp").write_text(source, encoding="utf-8")
    (folder / "main.cpp").write_text(main, encoding="utf-8")
    flags = ["-std=c++17", "-O1", "-w", "-ffp-contract=off", "-fwrapv", "-isystem", str(ap_types())]
    compile_cpp([*flags, "main.cpp", "-o", "reference"], folder)
    count = len(words[names[0]])
    data = b"".join(np.uint64(len(words[name])).tobytes() + words[name].tobytes() for name in names)
    run = subprocess.run([str(folder / "reference"), str(count)], input=data, capture_output=True, check=True)
    results, at = {}, 0
    for name in names:
        size = int(np.frombuffer(run.stdout, np.uint64, 1, at)[0])
        results[name] = np.frombuffer(run.stdout, np.uint64, size, at + 8)
        at += 8 + 8 * size
    return results
