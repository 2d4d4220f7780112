# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch

from ahcq_plugin.mm.cache import Cache, digest
from ahcq_plugin.mm.files import write_json


def test_a_value_is_computed_once_per_key(tmp_path):
    cache, calls = Cache(tmp_path / "new"), []

    def compute():
        calls.append(1)
        return {"a": [0.1, 2]}

    assert [cache.fetch("x", lambda key=key: key, compute) for key in ("k", "k", "other")] == [{"a": [0.1, 2]}] * 3
    assert len(calls) == 2


def test_without_a_folder_nothing_is_kept_nor_hashed():
    assert [Cache(None).fetch("x", pytest.fail, lambda n=n: n) for n in (1, 2)] == [1, 2]


def test_a_damaged_file_is_computed_again(tmp_path):
    cache = Cache(tmp_path)
    cache.fetch("x", lambda: "k", lambda: 1)
    (path,) = tmp_path.iterdir()
    path.write_text("{")
    assert cache.fetch("x", lambda: "k", lambda: 2) == 2 and json.loads(path.read_text()) == 2


VALUES = [None, 0, 0.0, "0", b"0", [], [0], [[0]], {"a": 0}, {"a": 1}, {"b": 0}, "a", ["a", "b"], ["ab"], [0, 0]]
VALUES += [torch.zeros(2), torch.zeros(2, 1), torch.zeros(2).half(), np.zeros(3), torch.ones(2)]


def test_different_values_have_different_hashes_and_equal_ones_equal():
    assert len({digest(value) for value in VALUES}) == len(VALUES)
    assert digest({"a": torch.arange(3), "b": (1, 2)}) == digest({"b": [1, 2], "a": np.arange(3)})


def test_an_object_without_value_is_refused():
    with pytest.raises(TypeError, match="by value"):
        digest(object())


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json({"a": 1}, path)
    with pytest.raises(ValueError):
        write_json({"a": float("nan")}, path)
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
