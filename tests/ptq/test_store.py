# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ahcq_plugin.ptq import store as store_module
from ahcq_plugin.ptq.store import Store

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", ["cpu", "disk"])
@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 4), repeat=st.booleans())
def test_gives_back_what_was_put(tmp_path_factory, device, seed, rows, repeat):
    store = Store(device, tmp_path_factory.mktemp("store"))
    x = torch.randn(1 if repeat else rows, 3, 2, generator=torch.Generator().manual_seed(seed)).repeat_interleave(
        rows if repeat else 1, 0
    )
    tree = ((x, {"y": [x[:, 1], None, 3]}), torch.tensor(2.5))
    store["key"] = tree
    got = store.get("key", CPU)
    assert torch.equal(got[0][0], x) and torch.equal(got[0][1]["y"][0], x[:, 1]) and torch.equal(got[1], tree[1])
    assert got[0][1]["y"][1:] == [None, 3]
    store.clear()
    assert "key" not in store


def test_repeated_rows_are_stored_once():
    store = Store("cpu")
    store["tokens"] = torch.randn(1, 64, 8).repeat_interleave(16, 0)
    got = store.get("tokens", CPU)
    assert got.shape == (16, 64, 8) and got.untyped_storage().nbytes() == 64 * 8 * 4


def test_a_view_does_not_keep_the_whole_tensor_alive():
    store = Store("cpu")
    store["part"] = torch.randn(100, 8)[:2]
    assert store.get("part", CPU).untyped_storage().nbytes() == 2 * 8 * 4


@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_large_tensors_are_kept_in_half_precision(monkeypatch, tmp_path, device):
    """To 2^-11 of each value; not those that half precision cannot hold, not integers, not repeated rows."""
    monkeypatch.setattr(store_module, "HALF_FROM", 64)
    generator = torch.Generator().manual_seed(0)
    large, small = torch.randn(8, 8, generator=generator) * 100, torch.randn(63, generator=generator)
    store = Store(device, tmp_path)
    store["x"] = large, small, large * 1e4, torch.full_like(large, torch.nan), large.long(), large[:1].expand(99, 8)
    got = store.get("x", CPU)
    assert got[0].dtype == torch.float32 and not torch.equal(got[0], large)
    assert bool(((got[0] - large).abs() <= large.abs() * 2**-11 + 2**-25).all())
    assert torch.equal(got[1], small) and torch.equal(got[2], large * 1e4) and bool(got[3].isnan().all())
    assert torch.equal(got[4], large.long()) and torch.equal(got[5], large[:1].expand(99, 8))
    kept = 64 * 2 + 63 * 4 + 2 * 64 * 4 + 64 * 8 + 8 * 4
    assert store.nbytes() == (kept if device == "cpu" else 0)


def test_disk_leaves_nothing_behind(tmp_path):
    store = Store("disk", tmp_path)
    store["a"] = torch.ones(3)
    store["a"] = torch.zeros(3)
    assert len(list(tmp_path.rglob("*.pt"))) == 1 and store.get("a", CPU).sum() == 0
    store.clear()
    assert not list(tmp_path.iterdir())
