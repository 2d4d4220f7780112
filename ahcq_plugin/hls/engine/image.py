# SPDX-License-Identifier: Apache-2.0
"""The memory that an engine and its host share."""

from __future__ import annotations

import numpy as np

from ahcq_plugin.export import SpecError
from ahcq_plugin.hls.engine.config import LANES

MAX_BEATS = 2**26  # 2 GiB, the PS memory of the board


class Image:
    """Words of DDR memory; addresses count beats of eight words (32 bytes), pieces begin at multiples of two (64).

    Attributes:
        words: uint32, all of memory; longer after each ``reserve``.
        used: beats that are taken.
    """

    def __init__(self) -> None:
        self.words = np.zeros(0, np.uint32)
        self.used = 0

    def reserve(self, words: int) -> int:
        """Address of a new piece of ``words`` words, all zero; SpecError where memory ends."""
        address, beats = self.used, -(-words // LANES)
        self.used += beats + beats % 2
        if self.used > MAX_BEATS:
            raise SpecError(f"the program needs {self.used * 32} bytes of memory, there are {MAX_BEATS * 32}")
        if self.used * LANES > len(self.words):
            grown = np.zeros(max(self.used * LANES, 2 * len(self.words)), np.uint32)
            grown[: len(self.words)] = self.words
            self.words = grown
        return address

    def place(self, words: np.ndarray) -> int:
        """Address of a new piece that holds ``words`` (uint32, any shape, in C order)."""
        address = self.reserve(words.size)
        self.write(address, words)
        return address

    def write(self, address: int, words: np.ndarray) -> None:
        """Replace what is at ``address``."""
        self.words[address * LANES : address * LANES + words.size] = words.ravel()

    def read(self, address: int, words: int) -> np.ndarray:
        """A copy of the words at ``address``."""
        return self.words[address * LANES : address * LANES + words].copy()
