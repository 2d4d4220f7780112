# SPDX-License-Identifier: Apache-2.0
"""mypy with the settings of this repository reports what it is there for (`make lint` runs it on everything)."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLANTED = """
class Layer:
    bits: int = 4

def width(layer: Layer, rows: int) -> int:
    return layer.bit  # attr-defined

def name(layer: Layer) -> str:
    return layer.bits  # return-value

def untyped(layer):
    return width(Layer(), "3")  # arg-type

width(Layer())  # call-arg
Layer().bits = "4"  # assignment
widht  # name-defined
"""


def errors(folder: Path, source: str) -> list[tuple[int, str]]:
    """(line, code) of what mypy reports for ``source``."""
    (folder / "planted.py").write_text(source)
    settings = ["--config-file", ROOT / "pyproject.toml", "--no-incremental"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *settings, "planted.py"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    return [
        (int(line), code) for line, code in re.findall(r":(\d+): error: .*\[([a-z-]+)\]$", done.stdout, re.MULTILINE)
    ]


def test_planted_mistakes_are_reported(tmp_path) -> None:
    expected = [
        (number, line.partition("# ")[2]) for number, line in enumerate(PLANTED.splitlines(), 1) if "  # " in line
    ]
    assert errors(tmp_path, PLANTED) == expected and len(expected) == 6


def test_sound_code_is_not(tmp_path) -> None:
    assert errors(tmp_path, "import no_such_module\n\nsize: int = None\nvalue = [size]\nvalue = str(value)\n") == []
