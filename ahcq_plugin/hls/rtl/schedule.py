# SPDX-License-Identifier: Apache-2.0
"""From a process to SystemVerilog: XLS optimises it, schedules it at II = 1 and writes it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from ahcq_plugin.hls.rtl.errors import RtlError, ToolError
from ahcq_plugin.hls.rtl.nodes import Node, sorted_nodes
from ahcq_plugin.hls.rtl.package import Process
from ahcq_plugin.support.files import write_json
from ahcq_plugin.support.user_cache import user_cache

FORMAT = "ahcq_plugin.hls.rtl/1"  # of the cache: raise it where the call of XLS changes
# Rough delays of operations for the choice of the circle that an error names; the schedule has XLS's own.
_WEIGHTS = dict(
    smul=8, umul=8, add=4, sub=4, neg=4, invoke=40, shll=3, shrl=3, shra=3, udiv=60, sdiv=60, umod=60, smod=60
)
_FREE = (
    "literal",
    "bit_slice",
    "concat",
    "zero_ext",
    "sign_ext",
    "tuple_index",
    "identity",
    "state_read",
    "receive",
    "send",
)


@dataclass(frozen=True)
class ScheduleOptions:
    """Attributes:
    clock_ps: length of a stage in picoseconds of the delay model.
    delay_model: of XLS; there is none of an FPGA.
    """

    clock_ps: int = 1500
    delay_model: str = "asap7"


@dataclass(frozen=True)
class Scheduled:
    """SystemVerilog of one process, and the number of its pipeline stages."""

    verilog: str
    stages: int


def schedule(process: Process, options: ScheduleOptions | None = None, cache: Path | None = None) -> Scheduled:
    """Schedule ``process`` at one turn a cycle.

    Args:
        cache: folder for results, by the content of what determines them; None: none.
    Raises:
        ToolError: XLS is missing.
        RtlError: II = 1 is impossible; the message names the variable that goes round and the lines of its circle.
    """
    options = options or ScheduleOptions()
    path = None
    if cache is not None:
        key = json.dumps([FORMAT, _xls_version(), process.ir, process.constraints, asdict(options)])
        path = cache / f"{process.name}_{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        if path.is_file():
            return Scheduled(**json.loads(path.read_text(encoding="utf-8")))
    result = _run(process, options)
    if path is not None:
        write_json(asdict(result), path)
    return result


def cache_folder() -> Path:
    """Where results are kept: ``AHCQ_RTL_CACHE``, or a folder of the user's cache."""
    return Path(os.environ.get("AHCQ_RTL_CACHE") or user_cache() / "rtl")


def _xls_version() -> str:
    try:
        import xls  # noqa: F401
        from xls import _version
    except ImportError as error:
        raise ToolError(
            f"XLS is needed, which the package `xls-python` holds: `pip install ahcq_plugin[rtl]` ({error})"
        ) from None
    return str(getattr(_version, "__version__", ""))


def _run(process: Process, options: ScheduleOptions) -> Scheduled:
    _xls_version()
    from xls import Package, optimize_ir

    try:
        package = Package.parse_ir(optimize_ir(process.ir, process.name))
        result = package.schedule_and_codegen(
            generator="pipeline",
            delay_model=options.delay_model,
            with_delay_model=True,
            clock_period_ps=options.clock_ps,
            worst_case_throughput=1,
            io_constraints=list(process.constraints),
            reset="rst",
            use_system_verilog=True,
            module_name=process.name,
            flop_inputs=False,
            flop_outputs=False,
            streaming_channel_data_suffix="_data",
            streaming_channel_valid_suffix="_valid",
            streaming_channel_ready_suffix="_ready",
        )
    except RuntimeError as error:
        raise RtlError(_explained(process, str(error), options)) from None
    verilog = result.get_verilog_text() if hasattr(result, "get_verilog_text") else result.verilog_text
    stages = 1 + max(
        (int(found) for found in re.findall(r"^  reg .*\bp(\d+)_inputs_valid;", verilog, re.MULTILINE)), default=0
    )
    return Scheduled(verilog, stages)


def _explained(process: Process, said: str, options: ScheduleOptions) -> str:
    found = circles(process)
    short = said.strip().splitlines()[0][:600] if said.strip() else "no reason given"
    if not found or "chedul" not in said and "throughput" not in said:
        return f"XLS failed on the process `{process.name}`: {short}"
    lines = [f"II = 1 is impossible for the process `{process.name}` with stages of {options.clock_ps} ps."]
    for weight, variable, places in found[:3]:
        lines.append(f"  `{variable}` goes round through {', '.join(places) or 'no operation'} (weight {weight})")
    lines.append(
        "The first of these circles is probably the one: it has to fit into one stage. Sum inside first, add once."
    )
    return "\n".join([*lines, f"XLS: {short}"])


def circles(process: Process) -> list[tuple[int, str, list[str]]]:
    """The longest way from each state to its next value: (weight, C++ variable, places), longest first."""
    found = []
    for state, (read, following) in process.states.items():
        best: dict[Node, tuple[int, Node | None]] = {read: (0, None)}
        for node in sorted_nodes([following]):
            ways = [(best[one][0] + _weight(node), one) for one in node.operands if one in best]
            if ways and node is not read:
                best[node] = max(ways, key=lambda way: way[0])
        if following not in best or following is read:
            continue
        places, node = [], following
        while node is not None and node is not read:
            if node.debug >= 0 and _weight(node) > 1:
                places.append(str(process.module.place(node.debug)))
            node = best[node][1]
        variable = process.variables.get(state, state)
        found.append((best[following][0], variable, list(dict.fromkeys(places[::-1]))))
    return sorted(found, key=lambda one: -one[0])


def _late(process: Process) -> list[tuple[str, int]]:
    """C++ variables that live from turn to turn, and the longest way to their next values from anywhere."""
    weights: dict[Node, int] = {}
    for node in sorted_nodes([following for _, following in process.states.values()]):
        weights[node] = _weight(node) + max((weights[one] for one in node.operands), default=0)
    found = [(process.variables[state], weights[following]) for state, (_, following) in process.states.items()]
    return sorted(found, key=lambda one: -one[1])


def _weight(node: Node) -> int:
    if node.op in _FREE:
        return 0
    if node.op == "invoke":
        return (
            1
            if any("equal" in key or "greater" in key or "unordered" in key for key in node.keys)
            else _WEIGHTS["invoke"]
        )
    return _WEIGHTS.get(node.op, 1)
