# SPDX-License-Identifier: Apache-2.0
"""Observers and fake quantizers, one family per file."""

from ahcq_plugin.quantizers.adaround import AdaRoundFakeQuantize
from ahcq_plugin.quantizers.base import FakeQuantize
from ahcq_plugin.quantizers.layers import QuantConv2d, QuantLinear, quantize_layer
from ahcq_plugin.quantizers.observers import AvgMinMaxObserver, RangeSearchObserver
from ahcq_plugin.quantizers.uniform import UniformFakeQuantize

#: Families of activation quantizers that a recipe can give a role.
ACTIVATION_FAMILIES = {"uniform": UniformFakeQuantize}

__all__ = [
    "ACTIVATION_FAMILIES",
    "AdaRoundFakeQuantize",
    "AvgMinMaxObserver",
    "FakeQuantize",
    "QuantConv2d",
    "QuantLinear",
    "RangeSearchObserver",
    "UniformFakeQuantize",
    "quantize_layer",
]
