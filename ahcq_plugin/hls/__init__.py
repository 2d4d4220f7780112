# SPDX-License-Identifier: Apache-2.0
"""Generated hardware: from a layer spec to HLS C++, C simulation, co-simulation and reports of Vitis HLS."""

from ahcq_plugin.hls.csim import compile_generated
from ahcq_plugin.hls.emit import generate
from ahcq_plugin.hls.layer import Layer, select
from ahcq_plugin.hls.options import HLSOptions

__all__ = ["HLSOptions", "Layer", "compile_generated", "generate", "select"]
