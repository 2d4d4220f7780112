# SPDX-License-Identifier: Apache-2.0
"""cocotb: random requests through the AXI4 ports, beside cocotbext-axi's memory and plain Python."""

from __future__ import annotations

import itertools
import random

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, ReadOnly, RisingEdge
from cocotbext.axi import AxiBus, AxiRam

SIZE = 2**16


async def _send(dut, name: str, words: list[int]) -> None:
    """Words to a stream of the ports, one after the other."""
    data, valid, ready = (getattr(dut, f"{name}_{part}") for part in ("data", "valid", "ready"))
    for word in words:
        data.value, valid.value = word, 1
        while True:
            await ReadOnly()
            taken = int(ready.value)
            await RisingEdge(dut.clk)
            if taken:
                break
    valid.value = 0


async def _receive(dut, rng: random.Random, count: int) -> list[int]:
    """``count`` beats, taken in about half of the cycles."""
    beats = []
    while len(beats) < count:
        dut.beat_ready.value = rng.random() < 0.5
        await ReadOnly()
        if int(dut.beat_valid.value) and int(dut.beat_ready.value):
            beats.append(int(dut.beat_data.value))
        await RisingEdge(dut.clk)
    dut.beat_ready.value = 0
    return beats


async def _start(dut, rng: random.Random) -> AxiRam:
    cocotb.start_soon(Clock(dut.clk, 4, unit="ns").start())
    for name in ("read_valid", "beat_ready", "write_valid", "written_ready"):
        getattr(dut, name).value = 0
    ram = AxiRam(AxiBus.from_prefix(dut, "m_axi"), dut.clk, dut.rst, size=SIZE)
    for channels in (ram.write_if, ram.read_if):
        channels.log.setLevel("WARNING")
        for channel in ("ar_channel", "r_channel", "aw_channel", "w_channel", "b_channel"):
            if hasattr(channels, channel):
                pauses = (rng.random() < 0.4 for _ in itertools.count())
                getattr(channels, channel).set_pause_generator(pauses)
    ram.write(0, rng.randbytes(SIZE))
    dut.rst.value = 1
    await ClockCycles(dut.clk, 3)
    dut.rst.value = 0
    await RisingEdge(dut.clk)
    return ram


@cocotb.test()
async def reads_give_the_beats_of_memory(dut) -> None:
    """Any address, number and stride, several requests under way."""
    rng = random.Random(1)
    ram = await _start(dut, rng)
    requests = [(rng.randrange(600), rng.randrange(1, 70), rng.choice([1, 1, 1, 3, 16])) for _ in range(60)]
    words = [stride << 64 | beats << 32 | address for address, beats, stride in requests]
    cocotb.start_soon(_send(dut, "read", words))
    wanted = [address + i * stride for address, beats, stride in requests for i in range(beats)]
    found = await _receive(dut, rng, len(wanted))
    assert found == [int.from_bytes(ram.read(32 * beat, 32), "little") for beat in wanted]
    assert int(dut.failed.value) == 0


@cocotb.test()
async def writes_change_their_words_and_an_answer_means_that_all_are_there(dut) -> None:
    """Requests of any number of words and place, those that cross a beat among them, with questions between."""
    rng = random.Random(2)
    ram = await _start(dut, rng)
    memory = bytearray(ram.read(0, SIZE))
    for _ in range(25):
        requests = []
        for _ in range(rng.randrange(1, 12)):
            words, address, data = rng.choice([1, 4, 8, rng.randrange(1, 9)]), rng.randrange(2000), rng.randbytes(32)
            memory[4 * address : 4 * (address + words)] = data[: 4 * words]
            requests.append(int.from_bytes(data, "little") << 64 | words << 32 | address)
        await _send(dut, "write", [*requests, 0])
        dut.written_ready.value = 1
        while True:
            await ReadOnly()
            if int(dut.written_valid.value):
                break
            await RisingEdge(dut.clk)
        assert bytes(ram.read(0, SIZE)) == bytes(memory)
        await RisingEdge(dut.clk)
        dut.written_ready.value = 0
    assert int(dut.failed.value) == 0
