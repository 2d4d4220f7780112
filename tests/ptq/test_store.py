# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

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


@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_keys_and_values_of_the_same_tokens_are_stored_once(monkeypatch, tmp_path, device):
    """SAM's final attention: keys are values plus one row of positions; nothing else that looks alike is."""
    monkeypatch.setattr(store_module, "HALF_FROM", 64)
    generator = torch.Generator().manual_seed(0)
    values, row = torch.randn(4, 6, 5, generator=generator), torch.randn(1, 6, 5, generator=generator)
    other = values + row + 1e-3 * torch.randn(4, 6, 5, generator=generator)
    tree = {"k": values + row, "v": values, "other": [other, values.reshape(4, 5, 6)]}
    store = Store(device, tmp_path)
    store["x"] = tree
    got = store.get("x", CPU)
    for found, wanted in zip(pytree.tree_leaves(got), pytree.tree_leaves(tree), strict=True):
        assert found.dtype == torch.float32
        assert bool(((found - wanted).abs() <= 2**-11 * (wanted.abs() + row.abs().max()) + 2**-20).all())
    assert torch.allclose(got["k"] - got["v"], row.expand(4, 6, 5), atol=2**-20)
    if device == "cpu":
        assert store.nbytes() == (3 * 120) * 2 + 30 * 4


def test_inputs_of_sam_bs_decoder_fit_into_three_gigabytes():
    """32 images, the 16 boxes drawn by default, both streams: the second two-way layer, then the final attention."""
    tokens, positions, queries = torch.randn(16, 4096, 256), torch.randn(1, 4096, 256), torch.randn(16, 7, 256)
    layer, final = Store("cpu"), Store("cpu")
    layer["x"] = queries, tokens, queries, positions.expand(16, 4096, 256)
    final["x"] = queries, tokens + positions, tokens
    assert 2 * 32 * layer.nbytes() < 3e9 and 2 * 32 * final.nbytes() < 3e9


def test_disk_leaves_nothing_behind(tmp_path):
    store = Store("disk", tmp_path)
    store["a"] = torch.ones(3)
    store["a"] = torch.zeros(3)
    assert len(list(tmp_path.rglob("*.pt"))) == 1 and store.get("a", CPU).sum() == 0
    store.clear()
    assert not list(tmp_path.iterdir())
