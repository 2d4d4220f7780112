# SPDX-License-Identifier: Apache-2.0
import errno
import random
import zipfile
from pathlib import Path

import pytest
import torch

from ahcq_plugin.support.checked import save_checked, seal
from ahcq_plugin.support.safe_load import safe_load

CONTENT = {"state": {"weight": torch.arange(40.0), "bias": torch.ones(3, dtype=torch.bfloat16)}, "note": ["a", 1]}


def is_content(found) -> bool:
    same = all(torch.equal(found["state"][name], value) for name, value in CONTENT["state"].items())
    return same and list(found) == list(CONTENT) and found["note"] == CONTENT["note"] and len(found["state"]) == 2


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_sealed_file_is_a_torch_file_and_a_zip_archive(tmp_path: Path):
    path = tmp_path / "new" / "file.pth"
    save_checked(CONTENT, path)
    assert is_content(safe_load(path)) and is_content(torch.load(path, weights_only=True))
    assert [file.name for file in path.parent.iterdir()] == ["file.pth"]
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"sha256:")


def test_every_flipped_bit_of_a_sealed_file_is_found(tmp_path: Path):
    path = tmp_path / "file.pth"
    save_checked(CONTENT, path)
    data = path.read_bytes()
    bits = random.Random(0).sample(range(8 * len(data)), 500)
    for bit in [*bits, *range(8 * (len(data) - 100), 8 * len(data))]:  # everywhere, and all of the digest's
        path.write_bytes(flipped(data, bit))
        with pytest.raises(ValueError, match=r"file\.pth (is refused|cannot be read)"):
            safe_load(path)


def test_a_flipped_bit_of_any_other_file_is_found_or_without_effect(tmp_path: Path):
    path = tmp_path / "file.pth"
    torch.save(CONTENT, path)
    data = path.read_bytes()
    found = 0
    for bit in random.Random(1).sample(range(8 * len(data)), 1000):
        path.write_bytes(flipped(data, bit))
        try:
            assert is_content(safe_load(path)), f"bit {bit} changes the content silently"
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
            found += 1
    assert found > 200  # the rest is padding, dates and members that nobody reads


def test_a_cut_or_grown_sealed_file_is_found(tmp_path: Path):
    path = tmp_path / "file.pth"
    save_checked(CONTENT, path)
    data = path.read_bytes()
    for changed in (
        data[:-1],
        data[:-71],
        data + b"\0",
        data[1:],
        data[:100] + data[101:],
        data[:500] + bytes(200) + data[700:],
    ):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"file\.pth (is refused|cannot be read)"):
            safe_load(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file.pth"
    save_checked({"a": 1}, path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr("ahcq_plugin.support.checked._comment", full)
        save_checked({"a": 2}, path)
    assert safe_load(path) == {"a": 1} and [file.name for file in tmp_path.iterdir()] == ["file.pth"]


def test_only_zip_archives_without_a_comment_are_sealed(tmp_path: Path):
    path = tmp_path / "file"
    save_checked({"a": 1}, path)
    for data in (b"", b"text" * 100, path.read_bytes()):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="does not end as a zip archive"):
            seal(path)
