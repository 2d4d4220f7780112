# SPDX-License-Identifier: Apache-2.0
"""HLS C++ to RTL with open tools: clang, XLS, Verilator, yosys (docs/hls_rtl.md)."""

from ahcq_plugin.hls.rtl.clang import Program
from ahcq_plugin.hls.rtl.errors import Place, RtlError, ToolError
from ahcq_plugin.hls.rtl.netlist import Rtl, compile_rtl
from ahcq_plugin.hls.rtl.schedule import ScheduleOptions, cache_folder

__all__ = ["Place", "Program", "Rtl", "RtlError", "ScheduleOptions", "ToolError", "cache_folder", "compile_rtl"]
