# SPDX-License-Identifier: Apache-2.0
"""Reports of Vivado, where there are some: what placement took, and whether the clock is met."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ahcq_plugin.hls.synth import SynthesisError

# Of ``report_utilization``: names of UltraScale+ and of the series 7; a star stands before placement.
_ROWS: dict[str, tuple[str, ...]] = dict(
    lut=("CLB LUTs", "Slice LUTs"), ff=("CLB Registers", "Slice Registers"), dsp=("DSPs",), bram=("Block RAM Tile",)
)


@dataclass(frozen=True)
class Utilization:
    """What ``report_utilization`` counts.

    Attributes:
        state: of the design, such as ``Synthesized``, ``Fully Placed``, ``Routed``.
        used, available: lut, ff, dsp, and bram in units of RAMB36 (a RAMB18 is a half).
    """

    state: str
    used: dict[str, float]
    available: dict[str, float]


@dataclass(frozen=True)
class Timing:
    """What ``report_timing_summary`` says of the whole design.

    Attributes:
        setup_ns, hold_ns: the worst slacks; below 0: the clock is not met.
    """

    setup_ns: float
    hold_ns: float

    @property
    def meets_timing(self) -> bool:
        """Whether neither slack is below 0."""
        return self.setup_ns >= 0 and self.hold_ns >= 0


def read_utilization(path: Path) -> Utilization:
    """The numbers of a text report of ``report_utilization``; SynthesisError naming what is missing."""
    text = path.read_text(encoding="utf-8", errors="replace")
    state = re.search(r"^\| Design State\s*: *(.+?) *$", text, re.MULTILINE)
    if state is None:
        raise SynthesisError(f"{path.name} has no Design State; is it a text report of report_utilization?")
    used, available = {}, {}
    for kind, names in _ROWS.items():
        row = re.search(rf"^\| (?:{'|'.join(names)})\*? *\|(.+)\|\s*$", text, re.MULTILINE)
        cells = [cell.strip() for cell in row[1].split("|")] if row else []
        try:  # used first; available and a percentage last
            used[kind], available[kind] = float(cells[0]), float(cells[-2])
        except (ValueError, IndexError):
            raise SynthesisError(f"{path.name} has no row `{names[0]}` with two numbers or more") from None
    return Utilization(state[1], used, available)


def read_timing(path: Path) -> Timing:
    """The worst slacks of a text report of ``report_timing_summary``.

    Raises:
        SynthesisError: it has no summary, or no path that a clock constrains (``NA``).
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"Design Timing Summary.*?^ *(WNS\(ns\).+)\n[ -]+\n *(.+)$", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise SynthesisError(f"{path.name} has no Design Timing Summary; is it a report of report_timing_summary?")
    numbers = dict(zip(re.split(r"\s{2,}", found[1].strip()), found[2].split(), strict=False))
    try:
        return Timing(float(numbers["WNS(ns)"]), float(numbers["WHS(ns)"]))
    except (KeyError, ValueError):
        raise SynthesisError(
            f"{path.name} has no slack, got {found[2].strip()[:80]!r}: are there clock constraints?"
        ) from None
