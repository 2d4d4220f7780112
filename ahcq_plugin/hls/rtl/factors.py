# SPDX-License-Identifier: Apache-2.0
"""Powers of two that surely divide the values of a function: what indices say about the columns of arrays."""

from __future__ import annotations

from collections.abc import Iterable

from ahcq_plugin.hls.rtl.llvm_types import Block, Instruction, Local, Number, Value

_MOST = 64


def trailing_zeros(blocks: Iterable[Block]) -> dict[str, int]:
    """How many of the lowest bits of every integer that an instruction makes are surely 0 (a greatest fixed point)."""
    every = [one for block in blocks for one in block.instructions if one.result and one.type.kind == "int"]
    zeros = {one.result: _MOST for one in every}
    changed = True
    while changed:
        changed = False
        for one in every:
            now = min(zeros[one.result], _zeros(one, zeros))
            changed = changed or now != zeros[one.result]
            zeros[one.result] = now
    return zeros


def _zeros(one: Instruction, zeros: dict[str, int]) -> int:
    def of(value: Value) -> int:
        if isinstance(value, Number):
            return (value.value & -value.value).bit_length() - 1 if value.value else _MOST
        return zeros.get(value.name, 0) if isinstance(value, Local) else 0

    values = [of(value) for _, value in one.args]
    last = one.args[-1][1] if one.args else None
    if one.op in ("phi", "add", "sub", "or", "xor", "zext", "sext", "trunc", "freeze"):
        return min(values)
    if one.op == "select":
        return min(values[1:])
    if one.op == "and":
        return max(values)
    if one.op == "mul":
        return min(sum(values), _MOST)
    if one.op == "shl" and isinstance(last, Number):
        return min(values[0] + last.value, _MOST)
    if one.op in ("lshr", "ashr") and isinstance(last, Number):
        return max(values[0] - last.value, 0)
    return 0
