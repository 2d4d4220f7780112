# SPDX-License-Identifier: Apache-2.0
"""The sources of mmcv are joined for the CPU so that each file's content is compiled once, and left alone for a GPU."""

import importlib.util
import tarfile
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "build_mmcv.py"
FILES = ("pybind.cpp", "nms.cpp", "roi_align.cpp", "cpu/nms.cpp", "cuda/cudabind.cpp")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """gpu -> the folder of C++ sources that ``get_source`` makes of a small archive."""
    spec = importlib.util.spec_from_file_location("build_mmcv", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    inside = Path("mmcv") / "ops" / "csrc" / "pytorch"

    def download(command, check):
        original, folder = tmp_path / "original", Path(command[-1])
        for name in FILES:
            (original / inside / name).parent.mkdir(parents=True, exist_ok=True)
            (original / inside / name).write_text(name)
        with tarfile.open(folder / f"mmcv-{tool.VERSION}.tar.gz", "w:gz") as archive:
            archive.add(original, f"mmcv-{tool.VERSION}")

    monkeypatch.setattr(tool.subprocess, "run", download)
    return lambda gpu: Path(tool.get_source(tmp_path, gpu)) / inside


def units(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.cpp")}


def test_for_the_cpu_what_registers_operations_is_one_unit(source) -> None:
    folder = source(gpu=False)
    assert units(folder) == {"pybind.cpp", "operations.cpp", "cpu/nms.cpp", "cuda/cudabind.cpp"}
    assert (folder / "operations.cpp").read_text() == '#include "nms.inc"\n#include "roi_align.inc"\n'
    assert (folder / "nms.inc").read_text() == "nms.cpp" and (folder / "roi_align.inc").read_text() == "roi_align.cpp"


def test_for_a_gpu_nothing_changes(source) -> None:
    assert units(source(gpu=True)) == set(FILES)
