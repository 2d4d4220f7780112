# SPDX-License-Identifier: Apache-2.0
"""Functions in XLS IR for the float operations of a process, converted from ``hls/rtl/floats.x``."""

from __future__ import annotations

import re
from functools import cache

from ahcq_plugin.hls.resources import sources

_CONVERSION = re.compile(r"(sitofp|uitofp|fptosi|fptoui)_(\d+)")


def call_name(function: str) -> str:
    """The name in XLS IR of a function of ``floats.x``."""
    return f"__floats__{function}"


@cache
def ir_of(functions: frozenset[str]) -> str:
    """XLS IR that defines ``functions`` and what they need.

    Args:
        functions: names of ``floats.x``, or a conversion with its width, as ``sitofp_20``.
    """
    from xls import convert_dslx_to_ir

    text = sources("rtl", "floats.x").read_text(encoding="utf-8")
    for name in sorted(functions):
        if found := _CONVERSION.fullmatch(name):
            bits = found[2]
            kind = f"{'s' if found[1][0] == 's' or found[1].endswith('si') else 'u'}N[{bits}]"
            if found[1] in ("sitofp", "uitofp"):
                text += f"\npub fn {name}(x: {kind}) -> u32 {{ {found[1]}<u32:{bits}>(x) }}\n"
            else:
                text += f"\npub fn {name}(x: u32) -> {kind} {{ {found[1]}<u32:{bits}>(x) }}\n"
    ir = convert_dslx_to_ir(text, "floats.x", "floats")
    bodies = re.findall(r"^(?:#\[.*\]\n)?(?:top )?fn (\w+)\(.*?^\}\n", ir, re.MULTILINE | re.DOTALL)
    texts = [found[0] for found in re.finditer(r"^(?:top )?fn \w+\(.*?^\}\n", ir, re.MULTILINE | re.DOTALL)]
    by_name = dict(zip(bodies, texts, strict=True))
    wanted, stack = {}, [call_name(name) for name in sorted(functions)]
    while stack:
        name = stack.pop()
        if name not in wanted:
            wanted[name] = by_name[name]
            stack += re.findall(r"(?:to_apply|body)=(\w+)", by_name[name])
    kept = [re.sub(r"^top ", "", text) for name, text in by_name.items() if name in wanted]
    return re.sub(r", pos=\[[^\]]*\]", "", "\n".join(kept))
