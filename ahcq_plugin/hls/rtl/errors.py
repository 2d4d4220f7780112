# SPDX-License-Identifier: Apache-2.0
"""What the flow refuses, with the place in the C++."""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """A line of C++; ``line`` 0 where it is not known."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


class RtlError(RuntimeError):
    """The C++ is outside the subset of docs/hls_rtl.md, or a tool failed; the message starts with file and line."""

    def __init__(self, message: str, place: Place | None = None):
        super().__init__(f"{place}: {message}" if place else message)
        self.place = place


class ToolError(RtlError):
    """A program or package of the extra ``rtl`` is missing, or failed."""
