# SPDX-License-Identifier: Apache-2.0
"""XLS in a process of its own: packages of IR on standard input, SystemVerilog or what XLS said on standard output."""

import json
import sys
from typing import Any

from xls import Package, optimize_ir


def verilog(name: str, ir: str, constraints: list[str], delay_model: str, clock_ps: int) -> str:
    """SystemVerilog of the process ``name``, a turn a cycle; RuntimeError where XLS finds none."""
    package = Package.parse_ir(optimize_ir(ir, name))
    result: Any = package.schedule_and_codegen(
        generator="pipeline",
        delay_model=delay_model,
        with_delay_model=True,
        clock_period_ps=clock_ps,
        worst_case_throughput=1,
        io_constraints=constraints,
        reset="rst",
        use_system_verilog=True,
        module_name=name,
        flop_inputs=False,
        flop_outputs=False,
        streaming_channel_data_suffix="_data",
        streaming_channel_valid_suffix="_valid",
        streaming_channel_ready_suffix="_ready",
    )
    return result.get_verilog_text() if hasattr(result, "get_verilog_text") else result.verilog_text


def main() -> None:
    """One answer for each package: ``{"verilog": text}`` or ``{"error": text}``."""
    answers = []
    for job in json.load(sys.stdin):
        try:
            answers.append(dict(verilog=verilog(**job)))
        except RuntimeError as error:
            answers.append(dict(error=str(error)))
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
