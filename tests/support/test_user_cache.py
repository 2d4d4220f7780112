# SPDX-License-Identifier: Apache-2.0
"""What was compiled is only run from a folder of one's own."""

import os
from pathlib import Path

from ahcq_plugin.support.user_cache import user_cache


def test_the_folder_is_the_users_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert user_cache() == tmp_path / "mine" / "ahcq_plugin"
    assert user_cache().stat().st_mode & 0o777 == 0o700


def test_another_users_folder_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = os.getuid() + 1
    monkeypatch.setattr("os.getuid", lambda: other)
    found = user_cache()
    assert not found.is_relative_to(tmp_path) and found.is_dir() and user_cache() == found


def test_a_home_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert user_cache().is_dir() and not user_cache().is_relative_to(tmp_path)
