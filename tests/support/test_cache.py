# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from ahcq_plugin.support.cache import Cache
from ahcq_plugin.support.files import write_json


def test_a_value_is_computed_once_per_key(tmp_path):
    cache, calls = Cache(tmp_path / "new"), []

    def compute():
        calls.append(1)
        return {"a": [0.1, 2]}

    assert [cache.fetch("x", lambda key=key: key, compute) for key in ("k", "k", "other")] == [{"a": [0.1, 2]}] * 3
    assert len(calls) == 2


def test_without_a_folder_nothing_is_kept_nor_hashed():
    assert [Cache(None).fetch("x", pytest.fail, lambda n=n: n) for n in (1, 2)] == [1, 2]


@pytest.mark.parametrize("content", ["{", "{}", "7", "[]", '{"sha256": "0", "value": 1}', "[" * 100_000])
def test_a_damaged_file_is_computed_again(tmp_path, content):
    cache = Cache(tmp_path)
    cache.fetch("x", lambda: "k", lambda: 1)
    (path,) = tmp_path.iterdir()
    path.write_text(content)
    assert cache.fetch("x", lambda: "k", lambda: 2) == 2 and json.loads(path.read_text())["value"] == 2


def test_flipped_bits_are_found(tmp_path):
    cache, value = Cache(tmp_path), {"AP": 0.25, "masks": [[7, ["a1", "b2"]]]}
    cache.fetch("x", lambda: "k", lambda: value)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for place in range(len(content) - 1):  # the last byte is the line's end
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert cache.fetch("x", lambda: "k", lambda: value) == value
    assert cache.fetch("x", lambda: "k", pytest.fail) == value, "what was computed again is kept"


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json({"a": 1}, path)
    with pytest.raises(ValueError):
        write_json({"a": float("nan")}, path)
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
