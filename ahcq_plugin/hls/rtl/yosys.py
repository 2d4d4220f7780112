# SPDX-License-Identifier: Apache-2.0
"""Calls of yosys (the package ``pyosys``): files and commands in, the JSON that the last command writes out."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

from ahcq_plugin.hls.rtl.errors import ToolError

# A process of its own: yosys ends the one that it runs in where it fails.
_SCRIPT = """
import resource, sys
limit = int(sys.argv[1])
if limit:
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
from pyosys import libyosys
design = libyosys.Design()
for command in sys.argv[2:]:
    libyosys.run_pass("tee -q " + command if not command.startswith("tee") else command, design)
"""


def run_yosys(
    files: Mapping[str, str], commands: Sequence[str], result: str, what: str, limit: float | None = None
) -> Any:
    """The JSON that the commands write; they run in a folder with ``files`` (name -> text).

    Args:
        result: the file that they write.
        what: is worked on, for errors.
        limit: seconds of a core that yosys may take, and each ABC that it starts; None: any.
    Raises:
        ToolError: pyosys is missing or fails, or takes longer than ``limit``.
    """
    if find_spec("pyosys") is None:
        raise ToolError(f"yosys is needed for {what}, which the package `pyosys` holds: `pip install ahcq_plugin[rtl]`")
    with tempfile.TemporaryDirectory(prefix="ahcq_yosys_") as name:
        work = Path(name)
        for file, text in files.items():
            (work / file).write_text(text, encoding="utf-8")
        command = [sys.executable, "-c", _SCRIPT, str(ceil(limit or 0)), *commands]
        run = subprocess.run(command, cwd=work, capture_output=True, text=True)
        if run.returncode == -signal.SIGXCPU:
            raise ToolError(f"yosys had not counted {what} after {limit:g} s of a core")
        if run.returncode or not (work / result).is_file():
            raise ToolError(f"yosys failed on {what}:\n{(run.stdout + run.stderr)[-2000:]}")
        return json.loads((work / result).read_text(encoding="utf-8"))
