# SPDX-License-Identifier: Apache-2.0
"""A process that has imported everything and forks one child per case: 300 cases in minutes, each as if alone."""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
_MEMORY = 16 << 30
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
    """How a tool ended: its status, or the signal that killed it; seconds of the processor; all that it printed."""

    status: int
    signal: int
    cpu: float
    text: str


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

    def run(self, tool: str, argv: list[str], folder: Path, limit: int = 60) -> Ended:
        """``python tools/TOOL ARGV`` in ``folder``, killed after ``limit`` seconds of the processor."""
        case = {"tool": tool, "argv": argv, "folder": str(folder), "limit": limit}
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))


def _child(tool: str, argv: list[str], folder: str, limit: int, out: int) -> None:
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    signal.alarm(10 * limit)  # a wait costs the processor nothing
    status = 1
    try:
        sys.argv = [tool, *argv]
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - the child ends here
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve() -> None:
    """Read cases from stdin, a line each, and write how they ended."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in _IMPORTS:
        __import__(name)
    for line in sys.stdin:
        case = json.loads(line)
        with tempfile.TemporaryFile() as out:
            child = os.fork()
            if not child:
                _child(**case, out=out.fileno())
            _, code, used = os.wait4(child, 0)
            out.seek(0)
            text = out.read().decode("utf-8", "replace")
        ended = {
            "status": os.waitstatus_to_exitcode(code) if os.WIFEXITED(code) else -1,
            "signal": os.WTERMSIG(code) if os.WIFSIGNALED(code) else 0,
            "cpu": used.ru_utime + used.ru_stime,
            "text": text[-20_000:],
        }
        answers.write(json.dumps(ended) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
