# SPDX-License-Identifier: Apache-2.0
"""The process ``multiply`` on instantiated DSPs, in place of what XLS makes of its C++, which is its twin."""

from __future__ import annotations

from math import ceil, log2

from ahcq_plugin.hls.engine.config import LANES, NIBBLE, EngineConfig
from ahcq_plugin.hls.render import render
from ahcq_plugin.hls.resources import sources
from ahcq_plugin.hls.rtl.package import Process

NAME = "multiply_process"
#: Our simulation model of the primitive, for Verilator only: synthesis has the vendor's.
MODEL = "DSP48E2.sv"
PARTS = ("ahcq_multiply", "ahcq_dot", "ahcq_dsp")
_POWER = 16  # bits of a power of two: 2^s with s below MAX_LOG_LEVELS of types.h
_COUNT = 3  # bits of LANES


def chain(config: EngineConfig) -> int:
    """Inputs that a cascade of DSPs sums. Two columns of 8-bit codes fit a DSP if there are no more than four."""
    return LANES if config.plane == NIBBLE else LANES // 2


def stages(config: EngineConfig) -> int:
    """Cycles from operands to their sums."""
    return chain(config) + 3


def module_text(config: EngineConfig, process: Process) -> str:
    """SystemVerilog of ``multiply_process`` and of all below it but the primitive.

    Args:
        process: what the flow made of the C++; it says how wide the streams are.
    """
    widths = {port.name: port.bits for port in process.ports}
    folds = ceil(log2(config.right_depth))  # bits that sums of a pass grow by
    short = config.digit <= 8  # the types `digit_t` and `acc_t` of the C++, and the limit of SHIFTED
    shifted = _POWER - 1 + NIBBLE + _COUNT + folds
    parameters = dict(
        digit=config.digit,
        digit_word=8 if short else 32,
        code=config.plane,
        shifts=int(config.shifts),
        power=_POWER,
        chain=chain(config),
        sum_word=config.accumulator_bits,
        product_bits=config.digit + config.plane + _COUNT + folds,
        shift_bits=min(31, shifted) if short else shifted,
        left=widths["left"],
        out=widths["out"],
    )
    parts = [sources("rtl", "pe", f"{name}.sv").read_text(encoding="utf-8") for name in PARTS]
    return render("multiply_process.sv.j2", dict(top=NAME, parameters=parameters, parts=parts))
