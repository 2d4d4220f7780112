# SPDX-License-Identifier: Apache-2.0
"""The SystemVerilog of a design: its processes, and the module that joins them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ahcq_plugin.hls.render import render
from ahcq_plugin.hls.resources import sources
from ahcq_plugin.hls.rtl.channels import Ram
from ahcq_plugin.hls.rtl.clang import Program
from ahcq_plugin.hls.rtl.elaborate import Design, Instance, Slice, Stream, elaborate
from ahcq_plugin.hls.rtl.errors import Place, RtlError
from ahcq_plugin.hls.rtl.lint import lint
from ahcq_plugin.hls.rtl.narrow import Narrow, narrow
from ahcq_plugin.hls.rtl.package import ARGUMENTS, Process
from ahcq_plugin.hls.rtl.schedule import Scheduled, ScheduleOptions, schedule
from ahcq_plugin.support.files import write_text

CELLS = ("ahcq_fifo.sv", "ahcq_ram.sv", "ahcq_fork.sv")


@dataclass(frozen=True, eq=False)
class Rtl:
    """A design in SystemVerilog.

    Attributes:
        files: name -> text, the cells of ``hls/rtl`` among them; what stands below comes first.
        scheduled: what XLS made of every process, by its name.
    """

    design: Design
    files: dict[str, str]
    scheduled: dict[str, Scheduled]

    def write(self, folder: Path) -> list[Path]:
        """Write the files; their paths in the order in which tools read them."""
        for name, text in self.files.items():
            write_text(text, folder / name)
        return [folder / name for name in self.files]


def compile_rtl(
    program: Program,
    top: str,
    options: ScheduleOptions | None = None,
    cache: Path | None = None,
    faults: bool = False,
    modules: Mapping[str, Callable[[Process], str]] | None = None,
) -> Rtl:
    """HLS C++ to SystemVerilog.

    Args:
        top: C++ name of the top function.
        cache: folder for what XLS makes, by content.
        faults: take C++ with the faults of lint.py too.
        modules: name of a process -> SystemVerilog that stands in the place of what XLS makes of it.
    Raises:
        RtlError: the C++ has such a fault or is outside the subset, or II = 1 is impossible.
        ToolError: a package of the extra ``rtl`` is missing.
    """
    found = [] if faults else lint(program)
    if found:
        raise RtlError("\n".join(map(str, found)))
    module = program.module()
    pipelined = [Place(source.name, line) for source in program.files.values() for line in source.pipelined_loops()]
    design = elaborate(module, top, program.pragmas, pipelined)
    scheduled = schedule(list(design.processes.values()), options, cache)
    made = {name: f"// SPDX-License-Identifier: Apache-2.0\n{one.verilog}" for name, one in scheduled.items()}
    given = modules or {}
    made |= {one.name: given[one.name](one) for one in design.processes.values() if one.name in given}
    files = {name: sources("rtl", name).read_text(encoding="utf-8") for name in CELLS}
    files |= {f"{name}.sv": text for name, text in made.items()}
    files[f"{design.top}.sv"] = top_text(design, narrow(design, made, cache))
    return Rtl(design, files, scheduled)


def top_text(design: Design, narrowed: Mapping[str, Narrow]) -> str:
    """The module that joins the processes of a design by FIFOs, of which ``narrowed`` says what they hold."""
    launched = [one for one in design.instances if one.is_launched]
    values = dict(
        top=design.top,
        argument_bits=sum(bits for _, bits in design.arguments),
        ports=[dict(name=port.name, bits=port.bits, is_output=port.writer is not None) for port in design.ports],
        fifos=[_fifo(fifo, narrowed[fifo.name]) for fifo in design.fifos],
        launched=len(launched),
        instances=[_instance(one, launched) for one in design.instances],
    )
    return render("rtl_top.sv.j2", values)


def _fifo(fifo: Stream, narrowed: Narrow) -> dict[str, object]:
    held = f"{fifo.name}_held"
    return dict(
        name=fifo.name,
        bits=fifo.bits,
        depth=fifo.depth,
        held=held,
        held_bits=len(narrowed.kept),
        packed=narrowed.packed(f"{fifo.name}_in_data"),
        unpacked=narrowed.unpacked(held),
    )


def _instance(one: Instance, launched: list[Instance]) -> dict[str, object]:
    wires: list[tuple[str, str]] = []
    if one.scalars:
        words = [
            f"launch_data[{s.start + s.bits - 1}:{s.start}]" if isinstance(s, Slice) else None for s in one.scalars
        ]
        widths = [bits for _, bits in one.process.arguments]
        words = [word or f"{bits}'d{value}" for word, bits, value in zip(words, widths, one.scalars, strict=True)]
        wires.append((f"{ARGUMENTS}_data", f"{{{', '.join(words[::-1])}}}"))
        if one.is_launched:
            index = launched.index(one)
            wires += [
                (f"{ARGUMENTS}_valid", f"launch_valid[{index}]"),
                (f"{ARGUMENTS}_ready", f"launch_ready[{index}]"),
            ]
        else:
            wires += [(f"{ARGUMENTS}_valid", "1'b1"), (f"{ARGUMENTS}_ready", "")]
    for port in one.process.ports:
        stream = one.streams[port.name]
        side = stream.name if stream.is_port else f"{stream.name}_{'in' if port.is_output else 'out'}"
        wires += [(f"{port.name}_{part}", f"{side}_{part}") for part in ("data", "valid", "ready")]
    for ram in one.process.rams:
        for channel in ("ask", "answer", *(("put",) if ram.forwarded else ())):
            wires += [
                (f"{ram.name}_{channel}_{part}", f"{one.name}__{ram.name}_{channel}_{part}")
                for part in ("data", "valid", "ready")
            ]
    return dict(name=one.name, module=one.process.name, wires=wires, rams=[_ram(ram) for ram in one.process.rams])


def _ram(ram: Ram) -> dict[str, object]:
    both = ram.address_bits + ram.bits
    ask = ram.address_bits if ram.forwarded else 2 + ram.address_bits + both
    return dict(name=ram.name, bits=ram.bits, depth=ram.depth, forwarded=ram.forwarded, ask_bits=ask, put_bits=both)
