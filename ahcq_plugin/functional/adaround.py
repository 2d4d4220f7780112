# SPDX-License-Identifier: Apache-2.0
"""AdaRound: learned rounding of weights (Nagel et al., "Up or Down? Adaptive Rounding for PTQ", eq. 22-25).

Each weight w is quantized to ``floor(w / s) + h(alpha)`` with ``h`` the rectified sigmoid; a regulariser drives h to
0 or 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ahcq_plugin.functional.uniform import UniformParams

GAMMA, ZETA = -0.1, 1.1


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """``h(alpha) = clamp(1.2 * sigmoid(alpha) - 0.1, 0, 1)``, same shape; reaches 0 and 1 exactly."""
    return torch.clamp(torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def init_alpha(weight: Tensor, params: UniformParams) -> Tensor:
    """``alpha`` with ``h(alpha)`` the fractional part of ``weight / scale``: the soft weight starts at the weight."""
    ratio = weight.float() / params.scale
    fraction = ratio - torch.floor(ratio)
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1.0)


def soft_weight(base: Tensor, alpha: Tensor, params: UniformParams, bits: int) -> Tensor:
    """``(clamp(base + h(alpha), 0, 2^bits - 1) - zero_point) * scale``; differentiable in ``alpha``.

    Args:
        base: ``floor(weight / scale) + zero_point``, float32, the weight's shape (constant during learning).
    """
    codes = torch.clamp(base + rectified_sigmoid(alpha), 0, 2**bits - 1)
    return (codes - params.zero_point.to(torch.float32)) * params.scale


def floor_base(weight: Tensor, params: UniformParams) -> Tensor:
    """``floor(weight / scale) + zero_point`` as float32."""
    return torch.floor(weight.float() / params.scale) + params.zero_point.to(torch.float32)


def hard_codes(weight: Tensor, alpha: Tensor, params: UniformParams, bits: int) -> Tensor:
    """int64 codes: the weight rounded up where ``h(alpha) >= 0.5`` (alpha >= 0), down elsewhere, saturated."""
    return torch.clamp(floor_base(weight, params) + (alpha >= 0), 0, 2**bits - 1).long()


def rounding_regularizer(alpha: Tensor, exponent: float) -> Tensor:
    """Scalar ``sum(1 - |2 h(alpha) - 1|^exponent)``: 0 when every rounding is decided."""
    return (1.0 - (2.0 * rectified_sigmoid(alpha) - 1.0).abs().pow(exponent)).sum()
