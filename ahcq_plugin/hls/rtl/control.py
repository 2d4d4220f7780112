# SPDX-License-Identifier: Apache-2.0
"""Where the turns of a process begin: a function's control flow, cut so that no path between two cuts has a cycle.

A turn runs from the entry or from a cut to the next cut. Innermost loop headers are cuts, so that code of outer loops
runs in the turns of the inner ones. Further cuts are made where a cycle remains, and where a port is used twice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

from ahcq_plugin.hls.rtl.llvm_types import Block, Function, Instruction


class Control:
    """The control flow of a function.

    Attributes:
        blocks: by name, reachable ones only.
        cuts: names of the blocks at which turns begin, besides the entry.
        order: names, every block after those that come before it in a turn.
    """

    def __init__(self, function: Function):
        self.entry = next(iter(function.blocks))
        self.blocks = dict(function.blocks)
        self.blocks = {name: self.blocks[name] for name in _reachable(self.entry, self.successors)}
        self.predecessors: dict[str, list[str]] = {}
        self._connect()
        self.loops = self._find_loops()
        self.cuts: list[str] = [
            head
            for head, body in self.loops.items()
            if not any(head != other and other in body for other in self.loops)
        ]
        while head := self._cycle():
            self.cuts.append(head)
        self.order = self._ordered()

    def successors(self, name: str) -> list[str]:
        """Blocks to which a block branches, each once."""
        return list(dict.fromkeys(self.blocks[name].last.labels))

    def _connect(self) -> None:
        self.predecessors = {name: [] for name in self.blocks}
        for name in self.blocks:
            for target in self.successors(name):
                self.predecessors[target].append(name)

    def _find_loops(self) -> dict[str, set[str]]:
        """Header -> blocks of every loop."""
        loops: dict[str, set[str]] = {}
        for tail, head in self._back_edges(()):
            body, stack = {head, tail}, [tail]
            while stack:
                block = stack.pop()
                for before in self.predecessors[block] if block != head else ():
                    if before not in body:
                        body.add(before)
                        stack.append(before)
            loops.setdefault(head, set()).update(body)
        return loops

    def _back_edges(self, cuts: Iterable[str]) -> list[tuple[str, str]]:
        """Edges that close a cycle which no cut opens."""
        state: dict[str, int] = {}
        found = []
        for root in (self.entry, *cuts):
            if root in state:
                continue
            stack = [(root, iter(self.successors(root)))]
            state[root] = 1
            while stack:
                name, targets = stack[-1]
                for target in targets:
                    if target in cuts:
                        continue
                    if target not in state:
                        state[target] = 1
                        stack.append((target, iter(self.successors(target))))
                        break
                    if state[target] == 1:
                        found.append((name, target))
                else:
                    state[name] = 2
                    stack.pop()
        return found

    def _cycle(self) -> str | None:
        edges = self._back_edges(self.cuts)
        return edges[0][1] if edges else None

    def _ordered(self) -> list[str]:
        """Topological order of the blocks, edges into cuts left out."""
        cuts, seen, order = set(self.cuts), set(), []
        for root in (self.entry, *self.cuts):
            if root in seen:
                continue
            seen.add(root)
            stack = [(root, iter(self.successors(root)))]
            while stack:
                name, targets = stack[-1]
                target = next((one for one in targets if one not in seen and one not in cuts), None)
                if target is None:
                    order.append(name)
                    stack.pop()
                else:
                    seen.add(target)
                    stack.append((target, iter(self.successors(target))))
        return order[::-1]

    def before(self, name: str) -> list[str]:
        """Blocks that come right before ``name`` in the same turn."""
        return [] if name in self.cuts or name == self.entry else self.predecessors[name]

    def split(
        self,
        ports: Callable[[Instruction], tuple[Iterable[Hashable], Iterable[Hashable]]],
        may_split: Callable[[str, Instruction, Instruction], bool],
    ) -> None:
        """Cut before every instruction that must not come in the same turn as one before it.

        Args:
            ports: what an instruction uses, and what must not have been used before it.
            may_split: called with the block and both instructions, says whether to cut; may raise.
        """
        used: dict[str, dict[Hashable, Instruction]] = {}
        for name in list(self.order):
            now: dict[Hashable, Instruction] = {}
            for before in self.before(name):
                now |= used[before]
            block, at = self.blocks[name], 0
            while at < len(block.instructions):
                one = block.instructions[at]
                taken, refused = ports(one)
                first = next((now[port] for port in refused if port in now), None)
                if first is not None and may_split(name, first, one):
                    used[block.name] = now
                    block, at, now = self._cut(block, at), 0, {}
                now |= dict.fromkeys(taken, one)
                at += 1
            used[block.name] = now
        self._connect()
        self.order = self._ordered()

    def _cut(self, block: Block, at: int) -> Block:
        """Make a block of what follows instruction ``at``; it is a cut."""
        rest = Block(f"{block.name}.cut{len(self.cuts)}", block.instructions[at:])
        for target in self.successors(block.name):
            for phi in self.blocks[target].phis:
                phi.labels = [rest.name if label == block.name else label for label in phi.labels]
        for body in self.loops.values():
            if block.name in body:
                body.add(rest.name)
        jump = Instruction(None, "br", rest.last.type, [], [rest.name], debug=block.instructions[at].debug)
        block.instructions[at:] = [jump]
        self.blocks[rest.name] = rest
        self.cuts.append(rest.name)
        return rest

    def innermost(self, name: str) -> str | None:
        """Header of the innermost loop of a block."""
        around = [head for head, body in self.loops.items() if name in body]
        return min(around, key=lambda head: len(self.loops[head]), default=None)

    def reaching(self) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
        """For every block the blocks that may, and those that must, have run before it in the same turn."""
        may: dict[str, set[str]] = {}
        must: dict[str, set[str]] = {}
        for name in self.order:
            before = self.before(name)
            may[name] = set().union(*(may[one] | {one} for one in before))
            must[name] = set.intersection(*(must[one] | {one} for one in before)) if before else set()
        return may, must


def _reachable(entry: str, successors: Callable[[str], list[str]]) -> list[str]:
    seen, stack = {entry: None}, [entry]
    while stack:
        for target in successors(stack.pop()):
            if target not in seen:
                seen[target] = None
                stack.append(target)
    return list(seen)
