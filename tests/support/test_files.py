# SPDX-License-Identifier: Apache-2.0
"""Files and folders are whole or absent, and what killed processes left goes with the next write."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ahcq_plugin.support import files
from ahcq_plugin.support.files import replacing, replacing_folder, write_text


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_body_that_raises_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    write_text("old", tmp_path / "a")
    with pytest.raises(RuntimeError), replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert left(tmp_path) == {"a"} and (tmp_path / "a").read_text() == "old"


def fill(folder: Path, text: str) -> None:
    with replacing_folder(folder) as made:
        for name in "xyz":
            (made / name).write_text(text)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path, monkeypatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for text in ("one", "two"):
        fill(tmp_path / "f", text)
        assert left(tmp_path) == {"f"} and left(tmp_path / "f") == set("xyz")
        assert {path.read_text() for path in (tmp_path / "f").iterdir()} == {text}
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "f") as made:
        (made / "x").write_text("half")
        raise RuntimeError
    assert left(tmp_path) == {"f"} and (tmp_path / "f" / "x").read_text() == "two"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux exchanges names in one step")
def test_nobody_ever_sees_the_folder_missing(tmp_path: Path) -> None:
    fill(tmp_path / "f", "0")
    missing, stop = [], threading.Event()

    def look() -> None:
        while not stop.is_set():
            missing.append(not (tmp_path / "f" / "x").exists())

    watcher = threading.Thread(target=look)
    watcher.start()
    for turn in range(50):
        fill(tmp_path / "f", str(turn))
    stop.set()
    watcher.join()
    assert len(missing) > 50 and not any(missing)


def test_what_killed_processes_left_is_removed_by_the_next_write(tmp_path: Path) -> None:
    code = """if 1:
        import os, sys
        from ahcq_plugin.support.files import replacing, replacing_folder
        with replacing(sys.argv[1] + "/a") as a, replacing_folder(sys.argv[1] + "/f") as f:
            a.write_text("half"); (f / "x").write_text("half")
            os.kill(os.getpid(), 9)
    """
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2], check=False)
    assert len(left(tmp_path)) == 2
    alive = tmp_path / f".a.{files._HOST}-{os.getppid()}.tmp"
    other_host = tmp_path / ".a.00000000-999999999.tmp"
    for path in (alive, other_host):
        path.write_text("of a process that lives, or of another machine")
    write_text("whole", tmp_path / "a")
    fill(tmp_path / "f", "whole")
    assert left(tmp_path) == {"a", "f", alive.name, other_host.name}
