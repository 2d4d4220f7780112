# SPDX-License-Identifier: Apache-2.0
"""A process that has imported everything and forks one child per case: 300 cases in minutes, each as if alone."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
#: In the place of a tool: a call of the Python API (``calls.py``).
PYTHON = "python"
_MEMORY = 16 << 30
#: What can be wrong with the machine -> what makes it so, in the child.
SETUPS: dict[str, Callable[[], object]] = {
    "no files above 1 kB": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    "no files above 100 kB": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    "no room for what is printed": lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1),
    "nowhere to print to": lambda: os.close(1),
}
_IMPORTS = (
    "ahcq_plugin.mm.launch",
    "ahcq_plugin.mm.evaluate_checkpoint",
    "ahcq_plugin.mm.report.compare",
    "ahcq_plugin.mm.weights",
    "ahcq_plugin.studies.onnx_parity",
    "ahcq_plugin.studies.results_tables",
    "ahcq_plugin.hls",
)


@dataclass(frozen=True)
class Ended:
    """How a tool ended: its status, or the signal that killed it; seconds of the processor; all that it printed; and
    seconds by the clock."""

    status: int
    signal: int
    cpu: float
    text: str
    seconds: float = 0.0


class Zygote:
    """``with Zygote() as z: z.run("ptq.py", ["config.py"], folder)``."""

    def __enter__(self) -> Zygote:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.robustness.zygote"],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.stdin.close()
        self.process.wait()

    def run(
        self,
        tool: str,
        argv: list[str],
        folder: Path,
        limit: int = 60,
        kill_after: float | None = None,
        setup: str = "",
    ) -> Ended:
        """``python tools/TOOL ARGV``, or a call of ``calls.py``, in ``folder``, ended after ``limit`` seconds of the
        processor, or by SIGKILL after ``kill_after`` seconds by the clock, on a machine as of ``SETUPS``."""
        case = {"tool": tool, "argv": argv, "folder": str(folder), "limit": limit, "kill_after": kill_after}
        case["setup"] = setup
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))


def _child(tool: str, argv: list[str], folder: str, limit: int, setup: str, out: int) -> None:
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    signal.alarm(10 * limit)  # a wait costs the processor nothing
    status = 1
    try:
        if setup:
            SETUPS[setup]()
        sys.argv = [tool, *argv]
        script = ROOT / "tests" / "robustness" / "calls.py" if tool == PYTHON else ROOT / "tools" / tool
        runpy.run_path(str(script), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - the child ends here
        traceback.print_exc()
    with contextlib.suppress(OSError):  # it may be closed, or full
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait(child: int, kill_after: float | None) -> tuple[int, resource.struct_rusage]:
    """How a child ended, and what it used."""
    if kill_after is not None:
        end = time.monotonic() + kill_after
        while time.monotonic() < end:
            ended, code, used = os.wait4(child, os.WNOHANG)
            if ended:
                return code, used
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
    return os.wait4(child, 0)[1:]


def serve() -> None:
    """Read cases from stdin, a line each, and write how they ended."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in _IMPORTS:
        __import__(name)
    for line in sys.stdin:
        case = json.loads(line)
        with tempfile.TemporaryFile() as out:
            kill_after = case.pop("kill_after")
            begun = time.monotonic()
            child = os.fork()
            if not child:
                _child(**case, out=out.fileno())
            code, used = _wait(child, kill_after)
            out.seek(0)
            text = out.read().decode("utf-8", "replace")
        ended = {
            "status": os.waitstatus_to_exitcode(code) if os.WIFEXITED(code) else -1,
            "signal": os.WTERMSIG(code) if os.WIFSIGNALED(code) else 0,
            "cpu": used.ru_utime + used.ru_stime,
            "text": text[-20_000:],
            "seconds": time.monotonic() - begun,
        }
        answers.write(json.dumps(ended) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
