# SPDX-License-Identifier: Apache-2.0
"""Loops with PIPELINE as they are after LLVM: one turn a cycle needs one loop, without others in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from ahcq_plugin.hls.rtl.control import Control
from ahcq_plugin.hls.rtl.errors import Place, RtlError
from ahcq_plugin.hls.rtl.llvm_module import Module


class PipelinedLoops:
    """The loops of a function and where they stand in the C++; ``pipelined`` are the places of those with PIPELINE."""

    def __init__(self, module: Module, control: Control, pipelined: Collection[Place]):
        self._module, self._control, self._pipelined = module, control, pipelined

    def place(self, head: str) -> Place | None:
        """Of the loop with this header; None where LLVM does not say."""
        for name in self._control.loops[head]:
            last = self._control.blocks[name].last
            if head in last.labels and last.loop >= 0:
                return self._module.loop_place(last.loop)
        return None

    def pipelined(self, block: str) -> Place | None:
        """Of the innermost loop around a block, if it has PIPELINE."""
        head = self._control.innermost(block)
        place = self.place(head) if head else None
        return place if place in self._pipelined else None

    def check(self) -> None:
        """RtlError for a loop with PIPELINE that has another loop inside, or that is several."""
        loops = self._control.loops
        for head in loops:
            place = self.place(head)
            # LLVM makes two loops of one with `continue`, both at the same place
            inner = [
                other
                for other in loops
                if other != head and other in loops[head] and self.place(other) not in (None, place)
            ]
            if place in self._pipelined and inner:
                raise RtlError(
                    f"a loop with PIPELINE has a loop inside that stays one ({self.place(inner[0])}): give it "
                    "UNROLL and a constant number of turns",
                    place,
                )
        begins = Counter(self._written(head) for head in self._control.cuts)
        for place, count in begins.items():
            if place in self._pipelined and count > 1:
                raise RtlError(
                    f"II = 1 is impossible: the compiler made {count} loops of this one, since the ways through it "
                    "differ in what they assign, and going from one to the other takes a cycle. Assign what goes round "
                    "once, by a choice (a ? b : c), not in branches",
                    place,
                )

    def _written(self, head: str) -> Place | None:
        """Where the loop around a block stands in the C++: the innermost that says so."""
        loops = self._control.loops
        around = sorted((one for one, body in loops.items() if head in body), key=lambda one: len(loops[one]))
        return next((place for one in around if (place := self.place(one))), None)
