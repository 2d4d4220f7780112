# SPDX-License-Identifier: Apache-2.0
"""One try, and how most are prepared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.robustness.zygote import ROOT

DEMO = str(ROOT / "mm_configs" / "demo_sam_tiny_w4a4.py")


@dataclass(frozen=True)
class Case:
    """One try. ``prepare`` writes into an empty folder and returns the arguments of the tool, which runs there.

    ``setup``: what is wrong with the machine, see ``zygote.SETUPS``.
    """

    group: str
    name: str
    tool: str
    prepare: Callable[[Path], list[str]]
    control: bool = False
    setup: str = ""

    @property
    def full_name(self) -> str:
        """The tool, and what is wrong."""
        return f"{self.tool} {self.name}"


def config_with(text: str, options: tuple[str, ...] = ("--dry-run",), base: str = DEMO) -> Callable[[Path], list[str]]:
    """A leaf of ``base`` with ``text``."""

    def prepare(folder: Path) -> list[str]:
        (folder / "leaf.py").write_text(f"_base_ = {base!r}\n{text}\n")
        return [str(folder / "leaf.py"), "--work-dir", str(folder / "run"), *options]

    return prepare
