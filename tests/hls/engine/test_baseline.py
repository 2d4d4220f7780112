# SPDX-License-Identifier: Apache-2.0
"""Processing elements of INT4, INT8 and FP32 as RTL: integers exact, floats bit-equal to numpy in the stated order."""

from __future__ import annotations

import numpy as np
import pytest

from ahcq_plugin.hls.engine.baseline import element_rtl
from ahcq_plugin.hls.rtl import cache_folder
from ahcq_plugin.hls.rtl.simulate import Stalls, build

LANES, ROWS = 8, 8


def words(left: np.ndarray, right: np.ndarray, row: np.ndarray, begins: np.ndarray, gives: np.ndarray) -> list[int]:
    """The struct ``pe_inputs`` of each turn, as its bytes."""
    rows = [b"".join((a.tobytes(), b.tobytes(), bytes(rest))) for a, b, *rest in
            zip(left, right, row.astype(int), begins.astype(int), gives.astype(int), strict=True)]  # fmt: skip
    return [int.from_bytes(one, "little") for one in rows]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "bits"), [("INT4", 4), ("INT8", 8)])
def test_integers_are_exact(number: str, bits: int) -> None:
    rng = np.random.default_rng(bits)
    turns = 4000
    left, right = rng.integers(0, 2**bits, (2, turns, LANES)).astype(np.uint8)
    begins, gives = rng.random((2, turns)) < 0.2
    begins[0] = True
    sums, wanted = 0, []
    for t, product in enumerate((left.astype(int) * right).sum(1).tolist()):
        sums = product + (0 if begins[t] else sums)
        wanted += [sums] if gives[t] else []
    simulation = build(element_rtl(number, cache_folder()), cache_folder())
    sent = {"in": words(left, right, np.zeros(turns), begins, gives)}
    found = simulation.run(sent, {"out": len(wanted)}, Stalls(0.2, 0.2, 100)).outputs["out"][:, 0]
    assert found.tolist() == wanted


@pytest.mark.slow
def test_floats_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    turns = 4000
    left, right = (rng.standard_normal((2, turns, LANES)) * 2.0 ** rng.integers(-8, 9, (2, turns, LANES))).astype("f4")
    row = np.arange(turns) % ROWS
    begins, gives = rng.random((2, turns)) < 0.2
    begins[:ROWS] = True
    p = (left * right).T
    trees = ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]))
    sums, wanted = np.zeros(ROWS, np.float32), []
    for t, tree in enumerate(trees):
        sums[row[t]] = tree if begins[t] else sums[row[t]] + tree
        wanted += [sums[row[t]].view(np.uint32)] if gives[t] else []
    simulation = build(element_rtl("FP32", cache_folder()), cache_folder())
    sent = {"in": words(left, right, row, begins, gives)}
    found = simulation.run(sent, {"out": len(wanted)}, Stalls(0.2, 0.2, 100)).outputs["out"][:, 0]
    assert (found == np.array(wanted, np.uint32)).all()
