# SPDX-License-Identifier: Apache-2.0
"""cocotb test bench of one generated top, on its simulation shell or on the RTL that Vitis HLS exports: same ports.

The environment variable AHCQ_BENCH names an .npz file: ``addresses`` (JSON of registers), ``scales`` (float32), and for
launch i ``batch_i``, ``rows_i``, ``left_i``, ``right_i`` (bytes of all beats) and ``out_i`` (float bits of all beats).
"""

from __future__ import annotations

import itertools
import json
import os
import random

import cocotb
import numpy as np
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, RisingEdge, with_timeout
from cocotbext.axi import AxiLiteBus, AxiLiteMaster, AxiStreamBus, AxiStreamSink, AxiStreamSource

START, DONE, IDLE = 1, 2, 4
LONGEST_US = 20_000_000  # simulated; a launch that takes longer hangs


class Bench:
    """Owns the clock, the register port and the streams of the top ``dut``."""

    def __init__(self, dut) -> None:
        self.dut = dut
        self.data = np.load(os.environ["AHCQ_BENCH"])
        self.addresses = json.loads(str(self.data["addresses"]))
        self.is_product = "batch" in self.addresses
        cocotb.start_soon(Clock(dut.ap_clk, 4, unit="ns").start())
        ports = dict(clock=dut.ap_clk, reset=dut.ap_rst_n, reset_active_level=False)
        self.sources = {
            side: AxiStreamSource(AxiStreamBus.from_prefix(dut, f"s_axis_{side}"), **ports)
            for side in (("left", "right") if self.is_product else ("left",))
        }
        self.sink = AxiStreamSink(AxiStreamBus.from_prefix(dut, "m_axis_out"), **ports)
        self.control = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axi_control"), **ports)
        for port in (*self.sources.values(), self.sink, self.control.write_if, self.control.read_if):
            port.log.setLevel("WARNING")

    def stall(self, idle: bool, backpressure: bool, seed: int) -> None:
        """Random pauses of the sources (idle) and of the sink (backpressure), about half of the cycles each."""
        for index, port in enumerate((*self.sources.values(), self.sink)):
            wanted = backpressure if port is self.sink else idle
            rng = random.Random(seed * 7 + index)
            pauses = (rng.random() < 0.5 for _ in itertools.count())
            if wanted:
                port.set_pause_generator(pauses)

    async def reset(self) -> None:
        """Two cycles of reset; what the ports still had to send or had received is gone."""
        self.dut.ap_rst_n.value = 0
        for port in (*self.sources.values(), self.sink):
            port.clear()
        await ClockCycles(self.dut.ap_clk, 2)
        self.dut.ap_rst_n.value = 1
        await RisingEdge(self.dut.ap_clk)

    async def begin(self, launch: int) -> None:
        """Write every argument and start."""
        await self.control.write(self.addresses["scales"], self.data["scales"].tobytes())
        for name in ("batch", "rows") if self.is_product else ("rows",):
            await self.control.write_dword(self.addresses[name], int(self.data[f"{name}_{launch}"]))
        await self.control.write_dword(self.addresses["control"], START)

    async def send(self, launch: int) -> None:
        """Queue all beats of all operands, each as one packet."""
        for side, source in self.sources.items():
            await source.send(self.data[f"{side}_{launch}"].tobytes())

    async def check(self, launch: int) -> None:
        """Receive the result and compare it bit by bit with the golden model."""
        frame = await with_timeout(self.sink.recv(), LONGEST_US, "us")
        got = np.frombuffer(bytes(frame.tdata), np.uint32)
        wanted = self.data[f"out_{launch}"]
        assert len(got) == len(wanted), f"{len(got)} floats before the last beat, expected {len(wanted)}"
        wrong = np.flatnonzero(got != wanted)
        assert not len(wrong), (
            f"value mismatch: {len(wrong)} of {len(got)} floats differ, first number {wrong[0]}: "
            f"{got[wrong[0]]:#010x}, expected {wanted[wrong[0]]:#010x}"
        )
        while True:
            status = await self.control.read_dword(self.addresses["control"])
            if status & DONE:
                break
        assert status & IDLE and not status & START, f"done, but the control register is {status:#x}"
        assert not await self.control.read_dword(self.addresses["control"]) & DONE, "reading must clear done"
        assert self.sink.empty(), "beats after the last one"


@cocotb.test()
@cocotb.parametrize(idle=[False, True], backpressure=[False, True])
async def matches_golden(dut, idle: bool, backpressure: bool) -> None:
    """Every small launch, one after the other, in all four ways to stall."""
    bench = Bench(dut)
    bench.stall(idle, backpressure, seed=2 * idle + backpressure)
    await bench.reset()
    for launch in range(int(bench.data["small"])):
        await bench.begin(launch)
        await bench.send(launch)
        await bench.check(launch)


@cocotb.test()
async def a_reset_in_mid_packet_leaves_nothing(dut) -> None:
    """Reset while operands arrive, and while the result leaves; the next launch is as if nothing had been."""
    bench = Bench(dut)
    await bench.reset()
    for outgoing in (False, True, False):
        bench.sink.pause = outgoing
        await bench.begin(0)
        await bench.send(0)
        if outgoing:
            while not bench.dut.m_axis_out_TVALID.value:
                await RisingEdge(bench.dut.ap_clk)
            bench.sink.pause = False
            await ClockCycles(bench.dut.ap_clk, 3)
        else:
            beats = len(bench.data["left_0"]) // (len(bench.dut.s_axis_left_TDATA) // 8)
            for _ in range(max(1, beats // 2)):
                await RisingEdge(bench.dut.ap_clk)
                while not (bench.dut.s_axis_left_TVALID.value and bench.dut.s_axis_left_TREADY.value):
                    await RisingEdge(bench.dut.ap_clk)
        await bench.reset()
        assert not bench.dut.m_axis_out_TVALID.value, "a beat is still offered after the reset"
        bench.stall(True, True, seed=outgoing)
        await bench.begin(0)
        await bench.send(0)
        await bench.check(0)
        for port in (*bench.sources.values(), bench.sink):
            port.clear_pause_generator()
            port.pause = False


@cocotb.test()
async def many_vectors(dut) -> None:
    """The large launches, without stalls."""
    bench = Bench(dut)
    await bench.reset()
    for launch in range(int(bench.data["small"]), int(bench.data["launches"])):
        await bench.begin(launch)
        await bench.send(launch)
        await bench.check(launch)
