# SPDX-License-Identifier: Apache-2.0
import os
import random
from pathlib import Path

import pytest
import torch

from ahcq_plugin.support.checked import save_checked
from ahcq_plugin.support.safe_load import safe_load


def convert_legacy(path, out_path):
    save_checked(safe_load(path, legacy=True), out_path)


WHOLE = torch.arange(24.0).view(4, 6)
CONTENT = {"meta": {"epoch": 12}, "state_dict": {"a": WHOLE.t(), "b": WHOLE[1], "c": torch.ones(3).bool()}}


def write(content, path: Path) -> bytes:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path.read_bytes()


def test_the_converted_file_holds_what_torch_reads_from_the_old_one(tmp_path: Path):
    old, new = tmp_path / "old.pth", tmp_path / "new.pth"
    write(CONTENT, old)
    with pytest.raises(ValueError, match="bare pickle"):
        safe_load(old)
    convert_legacy(old, new)
    found, expected = safe_load(new), torch.load(old, weights_only=True)
    assert found["meta"] == expected["meta"] and list(found["state_dict"]) == list("abc")
    for name, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value) and found["state_dict"][name].stride() == value.stride()
    a, b = (found["state_dict"][name].untyped_storage() for name in "ab")
    assert a.data_ptr() == b.data_ptr()


class Planted:
    """Pickled as a call that writes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"echo run > {self.marker}",)


def test_a_planted_file_is_not_converted_and_does_not_run(tmp_path: Path):
    write({**CONTENT, "meta": Planted(tmp_path / "marker")}, tmp_path / "old.pth")
    with pytest.raises(ValueError, match=r"asks for '(posix|nt)\.system'"):
        convert_legacy(tmp_path / "old.pth", tmp_path / "new.pth")
    assert [file.name for file in tmp_path.iterdir()] == ["old.pth"]


def test_damage_is_one_line_of_error(tmp_path: Path):
    old, new = tmp_path / "old.pth", tmp_path / "new.pth"
    data, draw = write(CONTENT, old), random.Random(0)
    cuts = [data[:length] for length in range(0, len(data), 37)]
    for changed in [*cuts, data + b"\0", b"PK\3\4" + data]:
        old.write_bytes(changed)
        with pytest.raises(ValueError, match=r"old\.pth (cannot be read \(|is refused: ).*") as caught:
            convert_legacy(old, new)
        assert len(str(caught.value).splitlines()) == 1 and not new.exists()
    for _ in range(300):  # flipped bits of numbers cannot be told; nothing but a ValueError may come of the others
        changed = bytearray(data)
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        old.write_bytes(changed)
        try:
            convert_legacy(old, new)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
    with pytest.raises(FileNotFoundError, match="checkpoint not found"):
        convert_legacy(tmp_path / "none", new)
