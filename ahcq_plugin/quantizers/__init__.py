# SPDX-License-Identifier: Apache-2.0
"""Observers and fake quantizers, one family per file."""

from ahcq_plugin.quantizers.adaround import AdaRoundFakeQuantize
from ahcq_plugin.quantizers.agq import AGQFakeQuantize
from ahcq_plugin.quantizers.base import FakeQuantize
from ahcq_plugin.quantizers.cag import CAGFakeQuantize
from ahcq_plugin.quantizers.hluq import HLUQFakeQuantize
from ahcq_plugin.quantizers.layers import QuantConv2d, QuantLinear, quantize_layer
from ahcq_plugin.quantizers.lnq import LNQFakeQuantize
from ahcq_plugin.quantizers.observers import AvgMinMaxObserver, OutputErrorObserver, OwnErrorObserver
from ahcq_plugin.quantizers.percentiles import PercentileObserver
from ahcq_plugin.quantizers.power_of_two import PowerOfTwoFakeQuantize
from ahcq_plugin.quantizers.table import TableFakeQuantize
from ahcq_plugin.quantizers.uniform import UniformFakeQuantize

#: Families of activation quantizers that a recipe can give a role.
ACTIVATION_FAMILIES = {
    family.family: family
    for family in (
        UniformFakeQuantize,
        CAGFakeQuantize,
        HLUQFakeQuantize,
        LNQFakeQuantize,
        AGQFakeQuantize,
        PowerOfTwoFakeQuantize,
    )
}

__all__ = [
    "ACTIVATION_FAMILIES",
    "AGQFakeQuantize",
    "AdaRoundFakeQuantize",
    "AvgMinMaxObserver",
    "CAGFakeQuantize",
    "FakeQuantize",
    "HLUQFakeQuantize",
    "LNQFakeQuantize",
    "PowerOfTwoFakeQuantize",
    "QuantConv2d",
    "QuantLinear",
    "OutputErrorObserver",
    "OwnErrorObserver",
    "PercentileObserver",
    "TableFakeQuantize",
    "UniformFakeQuantize",
    "quantize_layer",
]
