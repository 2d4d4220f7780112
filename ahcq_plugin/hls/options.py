# SPDX-License-Identifier: Apache-2.0
"""How big and how fast the generated hardware is."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ahcq_plugin.export import SpecError


@dataclass(frozen=True)
class HLSOptions:
    """Settings of the generator.

    Attributes:
        pe: processing elements, one output value each at a time; a layer with fewer outputs gets fewer. A multiple
            of ``out``.
        simd: inputs of a processing element per cycle.
        out: float32 output values a beat.
        part: FPGA part that run_hls.tcl asks for.
        clock_mhz: clock that run_hls.tcl asks for.
    """

    pe: int = 128
    simd: int = 8
    out: int = 4
    part: str = "xczu9eg-ffvb1156-2-e"
    clock_mhz: int = 300

    def __post_init__(self) -> None:
        # 32 floats are the 1024 bits of the widest ap_uint outside Vitis; 32 codes are fewer
        for name, most in (("pe", 1024), ("simd", 32), ("out", 32), ("clock_mhz", 1000)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise SpecError(f"`{name}` must be an integer in [1, {most}], got {value!r}")
        if self.pe % self.out:
            raise SpecError(f"`pe` must be a multiple of `out` ({self.out}), got {self.pe}")
        if not isinstance(self.part, str) or not re.fullmatch(r"[A-Za-z0-9-]+", self.part):
            raise SpecError(f"`part` must be the name of an FPGA part, got {self.part!r}")
