# SPDX-License-Identifier: Apache-2.0
"""The processes of ``hls/include/ahcq/engine/softmax.h`` by themselves, without memory: a launch, C++ and RTL."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ahcq_plugin.export.table_softmax import TableSoftmax, logs, powers
from ahcq_plugin.hls.engine.config import LANES
from ahcq_plugin.hls.engine.simulate import compiled
from ahcq_plugin.hls.engine.softmax_command import check_step, factor_beats, rank_beats
from ahcq_plugin.hls.render import array, render
from ahcq_plugin.hls.resources import sources
from ahcq_plugin.hls.rtl import Program, Rtl, compile_rtl
from ahcq_plugin.support.files import write_text

#: The struct ``softmax_command``.
COMMAND = np.dtype(
    {
        "names": ["m", "n", "batch", "heads", "quantizers", "out_bits"],
        "formats": [np.uint32] * 3 + [np.uint16] * 2 + [np.uint8],
        "offsets": [0, 4, 8, 12, 14, 16],
        "itemsize": 20,
    }
)
_SOURCE = """#include "ahcq/engine/softmax.h"
using namespace ahcq::engine;
void softmax_rtl(
    hls::stream<softmax_command>& commands,
    hls::stream<beat>& factors,
    hls::stream<beat>& quantizers,
    hls::stream<beat>& scores,
    hls::stream<beat>& codes) {
#pragma HLS DATAFLOW
    softmax(commands, factors, quantizers, scores, codes);
}
"""


@dataclass(frozen=True, eq=False)
class SoftmaxLaunch:
    """What the processes get for one call.

    Attributes:
        command: uint32 (1, 5), the words of ``COMMAND``.
        factors, quantizers, scores: uint32 (beats, 8).
        shape: of the scores, (batch, m, n).
    """

    command: np.ndarray
    factors: np.ndarray
    quantizers: np.ndarray
    scores: np.ndarray
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, step: TableSoftmax, scores: np.ndarray) -> SoftmaxLaunch:
        """A launch for integer scores (batch, m, n), product i of head i mod heads.

        Raises:
            SpecError: rows, quantizers or heads that do not fit; says what is too large for what.
        """
        check_step("softmax", step, scores.shape)
        batch, m, n = scores.shape
        heads, (quantizers, bounds) = len(step.mantissas), step.bounds.shape
        command = np.zeros(1, COMMAND)
        command[0] = (m, n, batch, heads, quantizers, bounds.bit_length())
        rows = np.zeros((batch * m, -(-n // LANES) * LANES), np.int32)  # behind a row the engine masks
        rows[:, :n] = scores.reshape(-1, n)
        return cls(
            command.view(np.uint32).reshape(1, -1),
            factor_beats(step),
            rank_beats(step),
            rows.view(np.uint32).reshape(-1, LANES),
            (batch, m, n),
        )

    def codes(self, words: np.ndarray) -> np.ndarray:
        """int64 codes (batch, m, n) of what came out, uint32 (beats, 8).

        Raises:
            RuntimeError: a code behind the end of a row, or a word that holds none, is not 0.
        """
        nibbles = words[:, :2, None].astype(np.int64) >> (4 * np.arange(LANES)) & 15
        codes = (nibbles[:, 0] | nibbles[:, 1] << 4).reshape(*self.shape[:2], -1)
        if words[:, 2:].any() or codes[..., self.shape[2] :].any():
            raise RuntimeError("softmax gave something else than codes of its rows")
        return codes[..., : self.shape[2]]


def joined(launches: Sequence[SoftmaxLaunch]) -> dict[str, np.ndarray]:
    """What the ports get for launches one after the other: uint32 (words, parts)."""
    return {
        "commands": np.concatenate([one.command for one in launches]),
        "factors": np.concatenate([one.factors for one in launches]),
        "quantizers": np.concatenate([one.quantizers for one in launches]),
        "scores": np.concatenate([one.scores for one in launches]),
    }


def parted(launches: Sequence[SoftmaxLaunch], words: np.ndarray) -> list[np.ndarray]:
    """int64 codes (batch, m, n) of each launch from the beats of codes, uint32 (beats, 8)."""
    ends = np.cumsum([len(one.scores) for one in launches])
    return [one.codes(part) for one, part in zip(launches, np.split(words, ends[:-1]), strict=True)]


def run(launches: Sequence[SoftmaxLaunch]) -> list[np.ndarray]:
    """int64 codes (batch, m, n) of launches one after the other, by the C++ compiled by g++.

    Raises:
        BuildError: g++ is missing or fails.
        RuntimeError: the processes wait for each other.
    """
    function = compiled("softmax").ahcq_softmax_run
    function.restype = ctypes.c_uint64
    given = [np.ascontiguousarray(part) for part in joined(launches).values()]
    words = np.zeros((sum(len(one.scores) for one in launches), LANES), np.uint32)
    sized = [value for part in given for value in (_pointer(part), ctypes.c_uint64(len(part)))]
    made = function(*sized, _pointer(words))
    if made != len(words):
        raise RuntimeError(f"softmax gave {made} beats of codes, expected {len(words)}: its processes wait")
    return parted(launches, words)


def _pointer(values: np.ndarray) -> ctypes.c_void_p:
    return values.ctypes.data_as(ctypes.c_void_p)


def softmax_rtl(cache: Path | None = None) -> Rtl:
    """The RTL of the processes, each at a turn a cycle.

    Raises:
        RtlError: a process cannot be scheduled. ToolError: a package of the extra ``rtl`` is missing.
    """
    with tempfile.TemporaryDirectory(prefix="ahcq_softmax_") as folder:
        source = Path(folder) / "softmax.cpp"
        write_text(_SOURCE, source)
        return compile_rtl(Program(source, (sources("include"),)), "softmax_rtl", cache=cache)


def render_softmax_tables() -> str:
    """The text of ``softmax_tables.h``."""
    return render("softmax_tables.h.j2", dict(powers=array(powers()), logs=array(logs())))
