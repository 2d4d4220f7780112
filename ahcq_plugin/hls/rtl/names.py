# SPDX-License-Identifier: Apache-2.0
"""The values of a function: which of them are words of the hardware, how wide, and where they are still needed."""

from __future__ import annotations

from ahcq_plugin.hls.rtl.control import Control
from ahcq_plugin.hls.rtl.errors import RtlError
from ahcq_plugin.hls.rtl.llvm_types import Function, Instruction, Local
from ahcq_plugin.hls.rtl.memory import Memories


class Names:
    """See the module; made when the control flow is cut."""

    def __init__(self, function: Function, control: Control, memories: Memories):
        self.control, self.memories = control, memories
        self.arguments = dict(function.arguments)

    def width(self, name: str, seen: frozenset[str] = frozenset()) -> int:
        """Bits of a value; of a word of a stream those of the stream."""
        if name in self.arguments:
            return self.arguments[name].bits
        one = self.memories.definitions[name]
        if one.type.kind in ("int", "float"):
            return one.type.bits
        if one.op == "call" and one.detail == "__hls_pop":
            return one.args[1][1].value
        if one.op == "call" and one.detail == "__hls_new":
            return one.args[0][1].value
        for _, value in one.args[one.op == "select" :]:
            if isinstance(value, Local) and value.name not in seen and self.is_word(value.name, seen | {name}):
                return self.width(value.name, seen | {name})
        raise RtlError(f"a value of the type {one.type.kind}", self.memories.module.place(one.debug))

    def is_word(self, name: str, seen: frozenset[str] = frozenset()) -> bool:
        """Whether a value is a number or a word of a stream, not an address."""
        kind = self.arguments.get(name)
        if kind is not None:
            return kind.is_scalar
        one = self.memories.definitions[name]
        if one.type.kind != "ptr":
            return True
        if one.op == "call":
            return True
        return one.op in ("phi", "select", "freeze") and any(
            isinstance(value, Local) and value.name not in seen and self.is_word(value.name, seen | {name})
            for _, value in one.args[one.op == "select" :]
        )

    def _uses(self, one: Instruction) -> set[str]:
        access = self.memories.of.get(one)
        values = [value for _, value in one.args]
        if access is not None:
            values = [value for value, _ in access.terms] + ([one.args[0][1]] if access.is_write else [])
        elif one.op in ("getelementptr", "alloca"):
            return set()
        names = {value.name for value in values if isinstance(value, Local)}
        return {
            name
            for name in names
            if (name in self.arguments or name in self.memories.definitions) and self.is_word(name)
        }

    def live(self) -> dict[str, set[str]]:
        """Values that are needed at the start of a block and were made before."""
        use, made = {}, {}
        for name, block in self.control.blocks.items():
            use[name], made[name] = set(), set()
            for one in block.instructions:
                if one.op != "phi":
                    use[name] |= self._uses(one) - made[name]
                if one.result:
                    made[name].add(one.result)
        live: dict[str, set[str]] = {name: set() for name in self.control.blocks}
        changed = True
        while changed:
            changed = False
            for name in reversed(list(self.control.blocks)):
                out = set()
                for target in self.control.successors(name):
                    phis = self.control.blocks[target].phis
                    out |= live[target] - {phi.result for phi in phis}
                    for phi in phis:
                        values = zip(phi.args, phi.labels, strict=True)
                        out |= {
                            v.name
                            for (_, v), label in values
                            if label == name and isinstance(v, Local) and self.is_word(v.name)
                        }
                now = use[name] | (out - made[name])
                if now != live[name]:
                    live[name], changed = now, True
        return live
