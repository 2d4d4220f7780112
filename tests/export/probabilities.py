# SPDX-License-Identifier: Apache-2.0
"""Random quantizers of probabilities, as calibration might choose them."""

from __future__ import annotations

import numpy as np
import torch

from ahcq_plugin.export.operands import HLUQOperand, TableOperand, UniformOperand
from ahcq_plugin.functional import agq, lnq

FAMILIES = ("lnq", "agq", "uniform", "hluq")


def make_quantizer(family: str, bits: int, rng: np.random.Generator) -> UniformOperand | HLUQOperand | TableOperand:
    """A quantizer of one of ``FAMILIES``; of hluq only what is compared with is like a real one's."""
    top = 2**bits - 1
    if family == "uniform":
        return UniformOperand(bits, np.float32(rng.uniform(0.2, 1.5) / top), int(rng.integers(0, 3)))
    if family == "hluq":
        boundaries = np.sort(rng.uniform(-0.1, 1, top)).astype(np.float32)
        split = int(rng.integers(1, min(16, top - 1) + 1))
        return HLUQOperand(bits, np.float32(0), np.float32(0.1), np.float32(0.1), split, boundaries)
    scale = torch.tensor([rng.uniform(0.05, 1.0)], dtype=torch.float32)
    if family == "lnq":
        table = lnq.table(lnq.LNQParams(torch.tensor([2.0 ** rng.uniform(-9, 12)]), scale), bits)
    else:
        table = agq.table(agq.AGQParams(scale, torch.tensor([rng.choice(agq.allowed_taus(bits))])), bits)
    boundaries, codes = table.boundaries.numpy(), table.codes.numpy()
    return TableOperand(bits, boundaries, codes, np.arange(top + 1)[np.argsort(codes)], np.float32(1), np.float32(0))


def code_ranks(operand: UniformOperand | HLUQOperand | TableOperand) -> np.ndarray:
    """int64 (2^bits,): the rank of each code."""
    return np.arange(2**operand.bits) if isinstance(operand, UniformOperand) else np.argsort(operand.rank_codes)
