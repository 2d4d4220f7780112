# SPDX-License-Identifier: Apache-2.0
"""A module as gates of one output, simulated without delays: its outputs, and how often each net changes.

yosys maps the module to AND, OR, XOR, NOT and D flip-flops, multipliers too. 64 streams run at once, a bit of a word
each. A net that glitches within a cycle counts as what it settles to; the clock does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ahcq_plugin.hls.rtl.errors import ToolError
from ahcq_plugin.hls.rtl.yosys import run_yosys

STREAMS = 64
COMMANDS = (
    "read_verilog -sv {file}",
    "synth -flatten -noabc -top {top}",
    "dfflegalize -cell $_DFF_P_ 0",
    "abc -g AND,OR,XOR",
    "opt_clean -purge",
    "write_json gates.json",
)
_FLOP = "$_DFF_P_"
_GATES = {"$_AND_": np.bitwise_and, "$_OR_": np.bitwise_or, "$_XOR_": np.bitwise_xor, "$_NOT_": np.bitwise_xor}
_ONES = np.uint64(2**64 - 1)


@dataclass(frozen=True, eq=False)
class Gates:
    """A netlist; nets 0 and 1 are the constants.

    Attributes:
        ports: name -> nets, bit 0 first.
        levels: (operation, nets a, nets b, nets of the outputs), each level after all that it reads.
        flops: nets (d, q), two rows.
        nets: how many there are.
    """

    ports: dict[str, np.ndarray]
    levels: list[tuple[np.ufunc, np.ndarray, np.ndarray, np.ndarray]]
    flops: np.ndarray
    nets: int

    @property
    def gates(self) -> int:
        """Gates without flip-flops."""
        return sum(len(out) for _, _, _, out in self.levels)

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: tuple[str, ...], warm: int
    ) -> tuple[dict[str, np.ndarray], int]:
        """A cycle for each word of the inputs, all flip-flops beginning with 0.

        Args:
            inputs: port -> uint64 (cycles, bits): bit i of a word belongs to stream i; without the clock.
            outputs: ports that are wanted.
            warm: cycles at the beginning whose changes are not counted.
        Returns:
            (port -> uint64 (cycles, bits), changes of all nets in all streams).
        """
        values = np.zeros(self.nets, np.uint64)
        values[1] = _ONES
        d, q = self.flops
        cycles = len(next(iter(inputs.values())))
        found = {name: np.zeros((cycles, len(self.ports[name])), np.uint64) for name in outputs}
        changes = 0
        for cycle in range(cycles):
            before = values.copy()
            if cycle:
                values[q] = before[d]
            for name, words in inputs.items():
                values[self.ports[name]] = words[cycle]
            for operation, a, b, out in self.levels:
                values[out] = operation(values[a], values[b])
            for name, words in found.items():
                words[cycle] = values[self.ports[name]]
            if cycle >= max(warm, 1):
                changes += int(np.bitwise_count(values ^ before).sum())
        return found, changes


def gates(text: str, top: str, limit: float | None = None) -> Gates:
    """The module ``top`` of a SystemVerilog text as gates.

    Args:
        limit: seconds of a core for yosys.
    Raises:
        ToolError: pyosys is missing or fails, or takes longer; or the module has latches, or a circle of gates.
    """
    commands = [command.format(file="module.sv", top=top) for command in COMMANDS]
    module = run_yosys({"module.sv": text}, commands, "gates.json", top, limit)["modules"][top]
    numbers: dict[int | str, int] = {"0": 0, "1": 1, "x": 0}

    def net(bit: int | str) -> int:
        return numbers.setdefault(bit, len(numbers) - 1)

    ports = {name: np.array([net(bit) for bit in port["bits"]]) for name, port in module["ports"].items()}
    flops, waiting = [], []
    for cell in module["cells"].values():
        pins = {name: net(bits[0]) for name, bits in cell["connections"].items()}
        if cell["type"] not in (_FLOP, *_GATES):
            raise ToolError(f"{top} has a cell {cell['type']}, allowed are {', '.join((_FLOP, *_GATES))}")
        if cell["type"] == _FLOP:
            flops.append((pins["D"], pins["Q"]))
        else:  # not a is a xor 1
            waiting.append((cell["type"], pins["A"], pins.get("B", 1), pins["Y"]))
    driven = {out for *_, out in waiting}
    nets = len(numbers) - 1
    known = set(range(nets)) - driven
    levels: list[tuple[np.ufunc, np.ndarray, np.ndarray, np.ndarray]] = []
    while waiting:
        ready = [gate for gate in waiting if gate[1] in known and gate[2] in known]
        waiting = [gate for gate in waiting if gate[1] not in known or gate[2] not in known]
        if not ready:
            raise ToolError(f"{top} has a circle of {len(waiting)} gates without a flip-flop in it")
        for operation in dict.fromkeys(_GATES.values()):
            a, b, out = np.array([gate[1:] for gate in ready if _GATES[gate[0]] is operation], int).reshape(-1, 3).T
            levels.append((operation, a, b, out))
        known.update(gate[3] for gate in ready)
    return Gates(ports, levels, np.array(flops, int).reshape(-1, 2).T, nets)


def to_streams(bits: np.ndarray) -> np.ndarray:
    """uint64 (..., n) of 0 and 1 (STREAMS, ..., n): bit i of a word is stream i."""
    last = np.ascontiguousarray(np.moveaxis(bits, 0, -1))
    return np.packbits(last, axis=-1, bitorder="little").view(np.uint64)[..., 0]


def of_streams(words: np.ndarray) -> np.ndarray:
    """The inverse: uint8 (STREAMS, ..., n)."""
    octets = np.ascontiguousarray(words)[..., None].view(np.uint8)
    return np.moveaxis(np.unpackbits(octets, axis=-1, bitorder="little"), -1, 0)
