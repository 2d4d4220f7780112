# SPDX-License-Identifier: Apache-2.0
"""How a command of ``tools/`` ends: a line for what its user can mend, a traceback for a defect of ours."""

from __future__ import annotations

import linecache
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NoReturn

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_OURS = Path(__file__).resolve().parents[1]
_REPORT = (
    "this is a defect: please report it with the lines above, the command and the versions of torch and ahcq_plugin"
)


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run a tool's ``main`` and end the process.

    The status is what ``main`` returns, None for 0. An error that our own code raised in words of its own, or the
    system's about a file, is one line and the status 2; an error with an ``exit_status`` is told in full, and ends with
    that. What was not foreseen, as an error from inside a library, is a traceback and the status 1.
    """
    try:
        sys.exit(main() or OK)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - sorted here into foreseen and not
        if not is_foreseen(error):
            traceback.print_exc()
            sys.stderr.write(f"{_REPORT}\n")
            sys.exit(FAILED)
        status = getattr(error, "exit_status", BAD_INPUT)
        sys.stderr.write(f"error: {one_line(error)}\n" if status == BAD_INPUT else f"{error}\n")
        sys.exit(status)


@contextmanager
def importing(extra: str) -> Iterator[None]:
    """Imports of a tool from a room that needs the packages of an extra: where one is not installed, a line says how to
    get it, and the process ends. Warnings are not shown: torch has one, whatever the filters, when mmengine imports its
    optimizers."""
    try:
        with warnings.catch_warnings(record=True):
            yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(_OURS.name):
            raise
        sys.stderr.write(f"error: {error}: this tool needs what `pip install 'ahcq_plugin[{extra}]'` installs\n")
        sys.exit(BAD_INPUT)


def announcer() -> Callable[[str], None]:
    """Writes lines with the seconds since it was made: ``[  12 s] text``."""
    start = time.monotonic()

    def say(text: str) -> None:
        sys.stdout.write(f"[{time.monotonic() - start:4.0f} s] {text}\n")
        sys.stdout.flush()

    return say


def is_foreseen(error: BaseException) -> bool:
    """Whether an error is of the system about a file, or was raised by a ``raise`` of this package or of its tools."""
    if isinstance(error, OSError) or hasattr(error, "exit_status"):
        return True
    if isinstance(error, (AssertionError, NotImplementedError)) or error.__traceback__ is None:
        return False
    if isinstance(error, ModuleNotFoundError):  # a part of ours that is missing is not the user's to install
        return not (error.name or "").startswith(_OURS.name)
    innermost = _innermost(error.__traceback__)
    file = Path(innermost.tb_frame.f_code.co_filename).resolve()
    ours = file.is_relative_to(_OURS) or file.parent.name == "tools"
    return ours and linecache.getline(str(file), innermost.tb_lineno).lstrip().startswith("raise")


def one_line(error: BaseException) -> str:
    """The message without line breaks; of many files that could not be copied the first one's."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list) and error.args[0]:
        return str(error.args[0][0][-1])
    return " ".join(str(error).split()) or type(error).__name__


def _innermost(trace: TracebackType) -> TracebackType:
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace
