# SPDX-License-Identifier: Apache-2.0
import argparse
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ahcq_plugin.support.arguments import (
    at_least_one,
    check_apart,
    positive,
    usable_device,
    whole,
    writable,
    writable_file,
    writable_folder,
)

ROOT = Path(__file__).resolve().parents[2]


@given(st.integers(-100, 100), st.integers(0, 50), st.integers(-200, 200))
def test_whole_numbers_are_those_from_least_to_most(least: int, more: int, value: int) -> None:
    parse = whole(least, least + more)
    if least <= value <= least + more:
        assert parse(str(value)) == value
    else:
        with pytest.raises(argparse.ArgumentTypeError, match=f"got '{value}'"):
            parse(str(value))


@pytest.mark.parametrize("text", ["x", "", "nan", "1.5", "1e3", "99999999999999999999", "0", "-3"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"give a whole number from 1 to .*, got '{re.escape(text)}'"):
        at_least_one(text)


@given(st.floats() | st.floats(1e-13, 1e13))
def test_positive_numbers_are_above_zero_and_not_beyond_any_use(value: float) -> None:
    if 1e-12 <= value <= 1e12:
        assert positive(repr(value)) == value
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="give a finite number above 0"):
            positive(repr(value))


@pytest.mark.parametrize("name", ["", "gpu", "meta", "mps", "xla", "cuda:99", "cpu:1"])
def test_devices_that_are_not_there_are_refused(name: str) -> None:
    assert usable_device("cpu") == "cpu" and torch.cuda.device_count() < 99
    with pytest.raises(argparse.ArgumentTypeError, match="give cpu, cuda or cuda:N|is not there"):
        usable_device(name)


def test_places_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "new", "new/deep", "."):
        assert writable(str(tmp_path / name)) == tmp_path / name
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is made by looking"
    with pytest.raises(argparse.ArgumentTypeError, match="file is a file, not a folder"):
        writable(str(tmp_path / "file" / "below"))
    with pytest.raises(argparse.ArgumentTypeError, match=os.strerror(36)):
        writable(str(tmp_path / ("x" * 300)))
    with pytest.raises(argparse.ArgumentTypeError, match="must be the path of a file or folder"):
        writable("")


def test_files_are_no_folders_and_folders_no_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    assert writable_file(str(tmp_path / "file")) and writable_folder(str(tmp_path / "folder"))
    assert writable_file(str(tmp_path / "new")) == writable_folder(str(tmp_path / "new")) == tmp_path / "new"
    with pytest.raises(argparse.ArgumentTypeError, match="is a file, not a folder"):
        writable_folder(str(tmp_path / "file"))
    for path in (tmp_path / "folder", os.devnull):
        with pytest.raises(argparse.ArgumentTypeError, match="is no file that can be written"):
            writable_file(str(path))


def test_no_tool_takes_a_place_to_write_to_unchecked() -> None:
    for path in sorted((ROOT / "tools").glob("*.py")):
        options = re.findall(r"add_argument\(\s*([^)]*)", path.read_text(encoding="utf-8"))
        names = ("--out", "--json", "--work", "--work-dir", "--folder", "out")
        taken = [text for text in options if re.search(rf'"(?:{"|".join(names)})"', text)]
        wrong = [text for text in taken if not re.search(r"type=writable_(?:file|folder)", text)]
        assert not wrong or path.name in ("ptq.py", "build_mmcv.py"), f"{path.name}: {wrong}"


def test_no_tool_takes_a_number_or_a_device_unchecked() -> None:
    checked_later = {"ptq.py", "make_hls.py", "build_mmcv.py", "bench_memory.py"}  # by Recipe, HLSOptions
    for path in sorted((ROOT / "tools").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        wrong = re.findall(r'type=(?:int|float)\b|"--device", default|"--device", help', text)
        assert not wrong or path.name in checked_later, f"{path.name}: {wrong}; see support/arguments.py"


def test_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    path, link = tmp_path / "x.png", tmp_path / "link.png"
    check_apart(path, None, tmp_path / "y.png", path)  # not there: nothing is lost
    path.write_bytes(b"x")
    link.symlink_to(path)
    check_apart(path, None, tmp_path / "y.png")
    with pytest.raises(ValueError, match="link.png is read, and would be written over"):
        check_apart(link, None, path)
