# SPDX-License-Identifier: Apache-2.0
"""How codes lie in the engine's memory: rows of folds (left), folds of 64 columns or rows along k (right).

A fold is eight codes along k; a word has eight nibbles, code i at bits 4i to 4i + 3; a beat is eight words. ``slots``
is the channel of each place of the fold order, -1 for padding (``layout.fold_slots``).
"""

from __future__ import annotations

import numpy as np

from ahcq_plugin.hls.engine.config import LANES, NIBBLE, PES


def planes_of(bits: int) -> int:
    """1, or 2 where codes have more than four bits."""
    return 1 if bits <= NIBBLE else 2


def row_beats(folds: int, bits: int) -> int:
    """Beats of a row of left codes."""
    return -(-folds * planes_of(bits) // LANES)


def _words(codes: np.ndarray) -> np.ndarray:
    """uint32 (...) of nibbles (..., 8)."""
    return (codes.astype(np.uint32) << (NIBBLE * np.arange(LANES, dtype=np.uint32))).sum(-1, dtype=np.uint32)


def _nibbles(words: np.ndarray) -> np.ndarray:
    """int64 nibbles (..., 8) of uint32 words (...)."""
    return (words[..., None] >> (NIBBLE * np.arange(LANES, dtype=np.uint32)) & 15).astype(np.int64)


def _in_slots(codes: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Codes (..., k) in fold order, padded with 0: (..., folds, 8)."""
    padded = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), codes.dtype)], axis=-1)
    return padded[..., slots].reshape(*codes.shape[:-1], -1, LANES)


def left_words(codes: np.ndarray, slots: np.ndarray, bits: int) -> np.ndarray:
    """uint32 (rows, words) of left codes (rows, k): fold after fold, above 4 bits low and high word in turn."""
    folds = _in_slots(codes, slots)
    words = _words(folds & 15)
    if planes_of(bits) == 2:
        words = np.stack([words, _words(folds >> NIBBLE)], axis=-1).reshape(len(codes), -1)
    return np.pad(words, ((0, 0), (0, -words.shape[1] % LANES)))


def left_codes(words: np.ndarray, slots: np.ndarray, bits: int) -> np.ndarray:
    """int64 (rows, k), the inverse of ``left_words``."""
    planes = planes_of(bits)
    used = words[:, : len(slots) // LANES * planes].reshape(len(words), -1, planes)
    folds = sum(_nibbles(used[..., plane]) << (NIBBLE * plane) for plane in range(planes)).reshape(len(words), -1)
    codes = np.zeros((len(words), slots.max() + 1), np.int64)
    codes[:, slots[slots >= 0]] = folds[:, slots >= 0]
    return codes


def right_words(codes: np.ndarray, slots: np.ndarray, bits: int) -> np.ndarray:
    """uint32 (tiles, planes, folds, 64) of right codes (n, k); columns beyond n are 0."""
    folds = _in_slots(np.pad(codes, ((0, -len(codes) % PES), (0, 0))), slots)
    tiles = folds.reshape(-1, PES, *folds.shape[1:]).swapaxes(1, 2)
    return np.stack([_words(tiles >> (NIBBLE * plane) & 15) for plane in range(planes_of(bits))], axis=1)


def right_codes(words: np.ndarray, slots: np.ndarray, n: int) -> np.ndarray:
    """int64 (n, k), the inverse of ``right_words``."""
    planes = _nibbles(words)
    tiles = sum(planes[:, plane] << (NIBBLE * plane) for plane in range(planes.shape[1]))
    folds = tiles.swapaxes(1, 2).reshape(len(words) * PES, -1)[:n]
    codes = np.zeros((n, slots.max() + 1), np.int64)
    codes[:, slots[slots >= 0]] = folds[:, slots >= 0]
    return codes


def transposed_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint32 (planes, k, words) of right codes (k, n) of A.V: rows along k of whole beats, whole folds of k."""
    padded = np.pad(codes, ((0, -len(codes) % LANES), (0, -codes.shape[1] % PES)))
    columns = padded.reshape(len(padded), -1, LANES)
    return np.stack([_words(columns >> (NIBBLE * plane) & 15) for plane in range(planes_of(bits))])


def transposed_codes(words: np.ndarray, k: int, n: int) -> np.ndarray:
    """int64 (k, n), the inverse of ``transposed_words``."""
    planes = _nibbles(words)
    return sum(planes[plane] << (NIBBLE * plane) for plane in range(len(words))).reshape(words.shape[1], -1)[:k, :n]
