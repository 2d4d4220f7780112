# SPDX-License-Identifier: Apache-2.0
"""Backends that work here, and operands of real quantizers."""

from __future__ import annotations

import torch

from ahcq_plugin.export.convert import activation_operand
from ahcq_plugin.integer.backends import BACKENDS as ALL
from ahcq_plugin.integer.backends import _usable
from ahcq_plugin.quantizers import AGQFakeQuantize, LNQFakeQuantize


def works(name: str) -> bool:
    try:
        return bool(_usable(name, "cpu"))
    except RuntimeError:
        return False


BACKENDS = [name for name in ALL if works(name)]


def _frozen(quantizer):
    quantizer.finish()
    quantizer.enable_fake_quant()
    return activation_operand(quantizer)


def lnq_operand(bits: int):
    quantizer = LNQFakeQuantize(quant_max=2**bits - 1)
    quantizer.scale, quantizer.shape_factor = torch.tensor([0.8]), torch.tensor([50.0])
    return _frozen(quantizer)


def agq_operand(bits: int, tau: int):
    quantizer = AGQFakeQuantize(quant_max=2**bits - 1)
    quantizer.tau = torch.tensor([tau], dtype=torch.int32)
    return _frozen(quantizer)
