# SPDX-License-Identifier: Apache-2.0
"""A backend is tried on extreme codes before it is used: some CPUs' 8-bit products saturate sums of 16 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ahcq_plugin.export import golden
from ahcq_plugin.export.matmul import Matmul, accumulator_range, signed_bits
from ahcq_plugin.export.operands import UniformOperand, WeightOperand

if TYPE_CHECKING:
    from ahcq_plugin.integer.backends.base import Backend

_M, _K, _N = 19, 72, 24


def problem_of(backend: Backend, device: str) -> str | None:
    """What is wrong with a backend on a device; None: its products equal the golden model's.

    Codes of 8 bits, all extreme, as a linear and as a product of two activations.
    """
    if backend.name == "reference":
        return None
    from ahcq_plugin.integer.layers import IntegerLinear  # they use backends
    from ahcq_plugin.integer.products import IntegerProduct

    one = np.float32(1)
    activation = UniformOperand(8, one, 3)
    for codes, weights, zero in ((255, 255, 0), (255, 0, 255), (255, 255, 128)):
        weight = WeightOperand(8, np.full((_N, _K), weights), np.full(_N, one), np.full(_N, zero, np.int64))
        left, bias = np.full((_M, _K), codes), np.zeros(_N, np.float32)
        width = signed_bits(*accumulator_range(activation, weight, _K))
        wanted = golden.run(
            Matmul("check", "linear", "check", 1, _M, _K, _N, activation, weight, bias, width), left
        ).output
        layer = IntegerLinear(activation, weight, bias, keep=False).to(device)
        right = UniformOperand(8, one, zero)
        product = IntegerProduct(activation, right).to(device)
        rows = torch.full((_M, _K), codes, dtype=torch.uint8, device=device)
        columns = torch.full((1, _K, _N), weights, dtype=torch.uint8, device=device)
        try:
            linear, both = backend.linear(layer, rows), backend.product(product, rows[None], columns)[0]
        except RuntimeError as error:
            return str(error).splitlines()[0]
        for found in (linear, both):
            if not np.array_equal(found.cpu().numpy(), wanted):
                return "8-bit products are not exact on this processor (sums of 16 bits saturate)"
    return None
