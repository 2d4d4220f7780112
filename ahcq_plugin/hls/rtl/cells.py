# SPDX-License-Identifier: Apache-2.0
"""How many cells of an FPGA (UltraScale+) a design takes, counted by yosys. No placement, no timing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ahcq_plugin.hls.rtl.errors import ToolError
from ahcq_plugin.hls.rtl.netlist import CELLS, Rtl
from ahcq_plugin.hls.rtl.yosys import run_yosys
from ahcq_plugin.support.cache import Cache
from ahcq_plugin.support.digest import digest

FORMAT = "ahcq_plugin.hls.rtl.cells/4"  # of the cache: raise it where the commands change
_SYNTH = "synth_xilinx -family xcup -noiopad -noclkbuf{flatten} -top {top} -run "
# `synth_xilinx`, whose part `coarse` stands here without `share`: that proves for pairs of shifters that one can do the
# work of both, and had no end in three minutes on a cell's 512. Counts without it are higher, if anything.
COMMANDS = (
    "read_verilog -sv {files}",
    _SYNTH + "begin:coarse",
    "techmap -map +/cmp2lut.v -map +/cmp2lcu.v -D LUT_WIDTH=6",
    "alumacc",
    "opt",
    "memory -nomap",
    "opt_clean",
    _SYNTH + "map_memory:check",
    "tee -q -o stat.json stat -tech xilinx -json",
)
# LUTs of each memory of LUTs (UG974); a cell of another kind would be an error.
_MEMORY_LUTS = {
    **dict(RAM32X1S=1, RAM32X1D=2, RAM32M=4, RAM32M16=8, RAM64X1S=1, RAM64X1D=2, RAM64M=4, RAM64M8=8),
    **dict(RAM128X1S=2, RAM128X1D=4, RAM256X1S=4, RAM256X1D=8, RAM512X1S=8),
}


@dataclass(frozen=True)
class Cells:
    """Cells of a module.

    Attributes:
        lut: look-up tables of any size; those used as memory too.
        ff: flip-flops. dsp: DSP48E2. carry: CARRY4 and CARRY8.
        bram: block RAMs in units of RAMB36 (a RAMB18 is a half).
        logic_cells: yosys' estimate of logic cells.
    """

    lut: int
    ff: int
    dsp: int
    bram: float
    carry: int
    logic_cells: int


def count(
    files: dict[str, str],
    top: str,
    cache: Path | None = None,
    limit: float | None = None,
    without: Collection[str] = (),
) -> Cells:
    """Cells of the module ``top``, everything in it included but the modules ``without``.

    Args:
        files: name -> SystemVerilog, what stands below first.
        cache: folder for results, by content.
        without: their instances have ports only; then modules stay what they are, each is mapped once.
        limit: seconds of a core that yosys may take, and each ABC that it starts; None: any.
    Raises:
        ToolError: pyosys is missing or fails, or takes longer than ``limit``.
    """
    files = {name: _ports_only(text) if name.removesuffix(".sv") in without else text for name, text in files.items()}
    found = Cache(cache).fetch(
        f"cells_{top}",
        lambda: digest([FORMAT, COMMANDS, list(files.items()), top, bool(without)]),
        lambda: asdict(_cells(_statistics(files, top, not without, limit)["modules"], top)),
    )
    return Cells(**found)


def count_each(modules: Mapping[str, str], cache: Path | None = None, limit: float | None = None) -> dict[str, Cells]:
    """Cells of modules that hold no others; one call of yosys counts all that ``cache`` does not hold.

    Args:
        modules: name -> SystemVerilog.
        cache, limit: as ``count``.
    Raises:
        ToolError: as ``count``.
    """
    kept = Cache(cache)
    keys = {name: digest([FORMAT, COMMANDS, text, name]) for name, text in modules.items()}
    found = {name: kept.find(f"cells_{name}", key) for name, key in keys.items()}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        each = "".join(f"  {name} one_{name} ();\n" for name in missing)
        files = {f"{name}.sv": modules[name] for name in missing} | {"each.sv": f"module each;\n{each}endmodule\n"}
        statistics = _statistics(files, "each", False, limit)
        for name in missing:
            found[name] = asdict(_cells(statistics["modules"], name))
            kept.keep(f"cells_{name}", keys[name], found[name])
    return {name: Cells(**value) for name, value in found.items()}


def _ports_only(text: str) -> str:
    """A module that has no more than its parameters and ports, for yosys."""
    found = re.search(r"\bmodule\s+\w+\s*(#\(.*?\)\s*)?\(.*?\);", text, re.DOTALL)
    if found is None:
        raise ToolError(f"no module with ports in {text[:80]!r}")
    return f"(* blackbox *)\n{found[0]}\nendmodule\n"


def count_processes(rtl: Rtl, cache: Path | None = None) -> dict[str, Cells]:
    """Cells of every process, without its RAMs and FIFOs, and of the whole design, by their names."""
    counts = {name: count({f"{name}.sv": rtl.files[f"{name}.sv"]}, name, cache) for name in rtl.scheduled}
    return counts | {rtl.design.top: count(rtl.files, rtl.design.top, cache)}


def report(rtl: Rtl, cache: Path | None = None) -> dict[str, object]:
    """What ``hw_report.json`` says of a design: cells and pipeline stages of each process, how often it is there."""
    cells = count_processes(rtl, cache)
    instances = [one.process.name for one in rtl.design.instances]
    processes = {
        name: dict(asdict(cells[name]), stages=one.stages, instances=instances.count(name))
        for name, one in rtl.scheduled.items()
    }
    return dict(
        top=rtl.design.top, total=asdict(cells[rtl.design.top]), processes=processes, tool="yosys synth_xilinx xcup"
    )


def _statistics(files: Mapping[str, str], top: str, flatten: bool, limit: float | None) -> Any:
    """What yosys' `stat` says of ``top`` and all below it."""
    names = " ".join(file for file in files if file not in CELLS or len(files) > 1)
    flattened = " -flatten" if flatten else ""
    commands = [command.format(files=names, top=top, flatten=flattened) for command in COMMANDS]
    return run_yosys(files, commands, "stat.json", top, limit)


def _cells(modules: Mapping[str, Any], top: str) -> Cells:
    found = _totals(modules, f"\\{top}")
    unknown = [kind for kind in found if re.match(r"RAM\d", kind) and kind not in _MEMORY_LUTS]
    if unknown:
        raise ToolError(f"yosys made {unknown} of {top}, whose LUTs are not known")

    def of(*starts: str) -> int:
        return sum(number for kind, number in found.items() if kind.startswith(starts))

    return Cells(
        lut=of("LUT", "SRL") + sum(luts * found.get(kind, 0) for kind, luts in _MEMORY_LUTS.items()),
        ff=of("FD"),
        dsp=of("DSP48"),
        bram=of("RAMB36") + of("RAMB18") / 2,
        carry=of("CARRY"),
        logic_cells=int(modules[f"\\{top}"].get("estimated_num_lc", 0)),  # those of all below it too
    )


def _totals(modules: Mapping[str, Any], name: str) -> Counter[str]:
    """Cells by type in a module and all below it; yosys' own sum of those leaves flip-flops out."""
    found: Counter[str] = Counter()
    for kind, number in modules[name]["num_cells_by_type"].items():
        below = next((one for one in (kind, f"\\{kind}") if one in modules), None)
        inner = Counter({kind: 1}) if below is None else _totals(modules, below)
        found.update({one: number * count for one, count in inner.items()})
    return found
