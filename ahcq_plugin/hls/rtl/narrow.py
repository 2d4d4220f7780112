# SPDX-License-Identifier: Apache-2.0
"""Which bits of the streams between processes say anything: C++ structs have more than their numbers.

A bit needs no place in a FIFO where its writer gives it a constant value or the value of another bit, as in a number
extended by zeros or its sign, and where its reader does not look at it, as at the fields of a struct meant for others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from os import sched_getaffinity
from pathlib import Path
from typing import Any

from ahcq_plugin.hls.rtl.elaborate import Design, Stream
from ahcq_plugin.hls.rtl.yosys import run_yosys
from ahcq_plugin.support.cache import Cache
from ahcq_plugin.support.digest import digest

FORMAT = "ahcq_plugin.hls.rtl.narrow/1"  # of the cache: raise it where the commands change
_COMMANDS = (
    "read_verilog -sv module.sv",
    "hierarchy -top {top}",
    "proc",
    "flatten",
    "opt_expr",
    "opt_clean",
    "write_json module.json",
)
#: Of every bit of a port: of an input whether it is used; of an output "0", "1" or the lowest bit with the same value.
Bits = Mapping[str, Sequence[int | str | bool]]


@dataclass(frozen=True)
class Narrow:
    """A word of a stream in a FIFO.

    Attributes:
        kept: bits of the word that the FIFO holds, lowest first.
        sources: of every bit of the word what the reader gets: a place in ``kept``, or "0" or "1".
    """

    kept: tuple[int, ...]
    sources: tuple[int | str, ...]

    def packed(self, word: str) -> str:
        """The SystemVerilog of what goes into the FIFO."""
        return _joined(f"{word}[{run[-1]}:{run[0]}]" for run in _runs(self.kept))

    def unpacked(self, word: str) -> str:
        """The SystemVerilog of what the reader gets."""
        return _joined(
            f"{{{len(run)}{{1'b{run[0]}}}}}" if isinstance(run[0], str) else f"{word}[{run[-1]}:{run[0]}]"
            for run in _runs(self.sources)
        )


def _runs(values: Sequence[int | str]) -> list[list[int | str]]:
    """Neighbours that are one constant, or count up by one."""
    runs = groupby(enumerate(values), lambda pair: pair[1] if isinstance(pair[1], str) else pair[1] - pair[0])
    return [[value for _, value in run] for _, run in runs]


def _joined(parts: Iterable[str]) -> str:
    return f"{{{', '.join([*parts][::-1])}}}"


def narrow(design: Design, modules: Mapping[str, str], cache: Path | None = None) -> dict[str, Narrow]:
    """For every FIFO of a design, by its name, what it has to hold.

    Args:
        modules: name of a process -> its SystemVerilog.
        cache: folder for results, by content.
    Raises:
        ToolError: pyosys is missing or fails.
    """
    names = sorted({one.process.name for one in design.instances})
    with ThreadPoolExecutor(len(sched_getaffinity(0))) as pool:  # each is a process of its own
        found = dict(zip(names, pool.map(lambda name: bits_of(name, modules[name], cache), names), strict=True))
    return {fifo.name: _narrow(fifo, found) for fifo in design.fifos}


def _narrow(fifo: Stream, found: Mapping[str, Bits]) -> Narrow:
    if fifo.writer is None or fifo.reader is None:
        raise AssertionError(fifo.name)
    (writer, out), (reader, into) = fifo.writer, fifo.reader
    given, used = found[writer.process.name][f"{out}_data"], found[reader.process.name][f"{into}_data"]
    wanted = [value if use else "0" for value, use in zip(given, used, strict=True)]
    kept = sorted({value for value in wanted if not isinstance(value, str)}) or [0]  # no FIFO without a word
    return Narrow(tuple(kept), tuple(value if isinstance(value, str) else kept.index(value) for value in wanted))


def bits_of(name: str, text: str, cache: Path | None = None) -> Bits:
    """What the bits of the ports of a module say.

    Args:
        text: its SystemVerilog, all modules in it but primitives.
        cache: folder for results, by content.
    Raises:
        ToolError: pyosys is missing or fails.
    """
    return Cache(cache).fetch(
        f"bits_{name}", lambda: digest([FORMAT, _COMMANDS, name, text]), lambda: _bits(name, text)
    )


def _bits(name: str, text: str) -> dict[str, Any]:
    commands = [command.format(top=name) for command in _COMMANDS]
    module = run_yosys({"module.sv": text}, commands, "module.json", f"the ports of {name}")["modules"][name]
    outputs = [port["bits"] for port in module["ports"].values() if port["direction"] == "output"]
    used = {bit for bits in outputs for bit in bits}
    for cell in module["cells"].values():  # a primitive has no directions: all that it has is used
        directions = cell.get("port_directions", {})
        ends = cell["connections"].items()
        used |= {bit for port, bits in ends if directions.get(port) != "output" for bit in bits}
    return {
        port: [bit in used for bit in it["bits"]] if it["direction"] == "input" else _distinct(it["bits"])
        for port, it in module["ports"].items()
    }


def _distinct(bits: Sequence[int | str]) -> list[int | str]:
    """Constants (an undefined bit may be 0), and of each bit the first place of its net."""
    first: dict[int | str, int] = {}
    return [
        ("0" if bit == "x" else bit) if isinstance(bit, str) else first.setdefault(bit, place)
        for place, bit in enumerate(bits)
    ]
