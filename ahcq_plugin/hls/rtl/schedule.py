# SPDX-License-Identifier: Apache-2.0
"""From a process to SystemVerilog: XLS optimises it, schedules it at II = 1 and writes it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ahcq_plugin.hls.rtl.errors import RtlError, ToolError
from ahcq_plugin.hls.rtl.nodes import Node, sorted_nodes
from ahcq_plugin.hls.rtl.package import Process
from ahcq_plugin.support.cache import Cache
from ahcq_plugin.support.digest import digest
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


def schedule(
    processes: Sequence[Process], options: ScheduleOptions | None = None, cache: Path | None = None
) -> dict[str, Scheduled]:
    """Schedule every process at one turn a cycle, as many at a time as there are cores.

    Args:
        cache: folder for results, by the content of what determines them; None: none.
    Returns:
        What XLS made, by name.
    Raises:
        ToolError: XLS is missing.
        RtlError: II = 1 is impossible; the message names the variable that goes round and the lines of its circle.
    """
    options = options or ScheduleOptions()
    found: dict[str, Scheduled] = {}
    version, kept = _xls_version(), Cache(cache)
    keys = {
        process.name: digest(json.dumps([FORMAT, version, process.ir, process.constraints, asdict(options)]))
        for process in processes
    }
    for name, key in keys.items():
        if (value := kept.find(name, key)) is not None:
            found[name] = Scheduled(**value)
    missing = [process for process in processes if process.name not in found]
    for process, answer in zip(missing, _run(missing, options), strict=True):
        if "error" in answer:
            raise RtlError(_explained(process, answer["error"], options))
        found[process.name] = Scheduled(answer["verilog"], _stages(answer["verilog"]))
        kept.keep(process.name, keys[process.name], asdict(found[process.name]))
    return {process.name: found[process.name] for process in processes}


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


def _run(processes: Sequence[Process], options: ScheduleOptions) -> list[dict[str, str]]:
    """An answer of ``xls_process`` for each: they are shared out to processes, the largest first."""
    shares: list[list[int]] = [[] for _ in range(min(len(os.sched_getaffinity(0)), len(processes)))]
    load = [0] * len(shares)
    for index in sorted(range(len(processes)), key=lambda index: -len(processes[index].ir)):
        least = load.index(min(load))
        shares[least].append(index)
        load[least] += len(processes[index].ir)
    answers: dict[int, dict[str, str]] = {}
    with ThreadPoolExecutor(max(1, len(shares))) as pool:
        for share, made in zip(
            shares, pool.map(lambda share: _answers(processes, share, options), shares), strict=True
        ):
            answers |= zip(share, made, strict=True)
    return [answers[index] for index in range(len(processes))]


def _answers(processes: Sequence[Process], share: Sequence[int], options: ScheduleOptions) -> list[dict[str, str]]:
    jobs = [
        dict(name=one.name, ir=one.ir, constraints=list(one.constraints), **asdict(options))
        for one in (processes[index] for index in share)
    ]
    command = [sys.executable, str(Path(__file__).with_name("xls_process.py"))]
    run = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True)
    if run.returncode:
        names = ", ".join(job["name"] for job in jobs)
        raise ToolError(f"XLS ended while it made {names}:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout)


def _stages(verilog: str) -> int:
    found = re.findall(r"^  reg .*\bp(\d+)_inputs_valid;", verilog, re.MULTILINE)
    return 1 + max(map(int, found), default=0)


def _explained(process: Process, said: str, options: ScheduleOptions) -> str:
    found = circles(process)
    short = said.strip().splitlines()[0][:600] if said.strip() else "no reason given"
    if not found or "chedul" not in said and "throughput" not in said:
        return f"XLS failed on the process `{process.name}`: {short}"
    lines = [f"II = 1 is impossible for the process `{process.name}` with stages of {options.clock_ps} ps."]
    for weight, variable, places in found[:3]:
        lines.append(f"  `{variable}` goes round through {', '.join(places) or 'no operation'} (weight {weight})")
    lines.append(
        "The first of these circles is probably the one: it has to fit into one stage. Sum inside first, add once, or "
        "give longer stages (ScheduleOptions.clock_ps; make_hls --stage-ps)."
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
