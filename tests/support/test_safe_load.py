# SPDX-License-Identifier: Apache-2.0
"""``safe_load`` beside ``torch.load(weights_only=True)``, and archives that torch would not write."""

import argparse
import io
import logging
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ahcq_plugin.support.safe_load import safe_load
from ahcq_plugin.zoo.checkpoints import WEIGHTS_DIR

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128]


def same(a, b) -> bool:
    """Equal types, values bit for bit, layouts and flags, nested."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        layouts = [(t.dtype, t.shape, t.stride(), t.storage_offset(), t.requires_grad) for t in (a, b)]
        stored = [torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()) for t in (a, b)]
        return layouts[0] == layouts[1] and torch.equal(*stored)
    if isinstance(a, dict):
        extras = [vars(v) if type(v) is OrderedDict else {} for v in (a, b)]
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a) and extras[0] == extras[1]
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a


def saved(content, **options) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def load(data: bytes, folder: Path):
    path = folder / "file.pth"
    path.write_bytes(data)
    return safe_load(path)


def check_equal_to_torch(content, folder: Path) -> None:
    data = saved(content)
    assert same(load(data, folder), torch.load(io.BytesIO(data), weights_only=True))


@st.composite
def tensors(draw) -> Tensor:
    """Any dtype; whole, permuted, strided, expanded, empty and scalar ones, some of them parameters."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    seed, dtype = draw(st.integers(0, 99)), draw(st.sampled_from(DTYPES))
    numbers = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(seed))
    tensor = numbers.abs().to(dtype) if dtype in (torch.uint8, torch.bool) else numbers.to(dtype)
    if shape:
        tensor = tensor[:: draw(st.integers(1, 2))].permute(draw(st.permutations(range(len(shape)))))
        tensor = tensor[draw(st.integers(0, 1)) :]
        tensor = tensor.expand(2, *tensor.shape) if draw(st.booleans()) else tensor
    if draw(st.booleans()):
        return nn.Parameter(tensor, tensor.is_floating_point() and draw(st.booleans()))
    return tensor


KEYS = st.one_of(st.text(max_size=5), st.integers(-(2**70), 2**70), st.booleans(), st.none())
PLAIN = st.one_of(KEYS, st.floats(), st.binary(min_size=1, max_size=9), st.sampled_from(DTYPES))
OTHER = st.sampled_from([torch.Size([2, 3]), torch.device("cpu"), torch.device("cuda:1"), Counter({1: 2})])
CONTENTS = st.recursive(
    st.one_of(tensors(), PLAIN, OTHER),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4).map(OrderedDict),
        inner.map(lambda value: [value, value]),
    ),
    max_leaves=12,
)


@given(CONTENTS)
def test_it_reads_what_torch_reads(tmp_path_factory: pytest.TempPathFactory, content):
    check_equal_to_torch(content, tmp_path_factory.getbasetemp())


def test_views_of_one_storage_share_it_again(tmp_path: Path):
    whole = torch.arange(24.0).view(4, 6)
    weight = nn.Parameter(whole[1:3])
    found = load(saved([whole, whole.t(), whole[2, 3:], weight, weight]), tmp_path)
    assert same(found, [whole, whole.t(), whole[2, 3:], weight, weight])
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 1 and found[3] is found[4]
    found[0].zero_()
    assert not found[2].any()


def test_state_dicts_keep_their_versions_of_modules(tmp_path: Path):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 1, 4, 4)).sum().backward()
    optimizer.step()
    check_equal_to_torch({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path)
    assert load(saved(model.state_dict()), tmp_path)._metadata["1"] == {"version": 2}
    assert same(safe_load(WEIGHTS_DIR / "sam_tiny.pth"), torch.load(WEIGHTS_DIR / "sam_tiny.pth", weights_only=True))
    assert same(safe_load(WEIGHTS_DIR / "sam2_tiny.pth"), torch.load(WEIGHTS_DIR / "sam2_tiny.pth", weights_only=True))


def test_storages_are_not_cut_to_the_elements(tmp_path: Path):
    odd = torch.arange(5, dtype=torch.uint8)[:4].view(torch.int16)  # its storage has half an element more
    assert torch.equal(load(saved(odd), tmp_path), odd)


def test_numpy_scalars_are_read_and_arrays_left_out(tmp_path: Path):
    scalars = [np.float64(0.5), np.float32(-1), np.int64(2**62), np.uint8(3), np.bool_(True), np.complex64(1j)]
    content = {"lr": scalars, "history": np.arange(4.0), "names": np.array(["a", "b"]), "args": argparse.Namespace(a=1)}
    found = load(saved(content), tmp_path)
    assert list(found) == ["lr"] and same(found["lr"], scalars)
    assert [value.dtype for value in found["lr"]] == [value.dtype for value in scalars]
    with pytest.raises(ValueError, match=r"_reconstruct where that cannot be left out"):
        load(saved([np.arange(4.0)]), tmp_path)


SPECIAL = {
    "sparse": torch.eye(3).to_sparse(),
    "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
    "storage": torch.ones(2).untyped_storage(),
    "module": nn.Linear(2, 2),
    "set": {1},
}


@pytest.mark.parametrize("content", SPECIAL.values(), ids=SPECIAL)
def test_special_tensors_are_refused(content, tmp_path: Path):
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match=r"file\.pth is refused: .*--trust-checkpoint") as caught,
    ):
        warnings.simplefilter("ignore")
        load(saved({"a": content}), tmp_path)
    assert len(str(caught.value).splitlines()) == 1


class Planted:
    """Pickled as a call that writes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"echo run > {self.marker}",)


def as_tar(content) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(content, 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


FORMATS = {
    "zip": (saved, "asks for '(posix|nt)\\.system'.*may be malicious"),
    "legacy": (lambda content: saved(content, _use_new_zipfile_serialization=False), "bare pickle"),
    "tar": (as_tar, "tar archive"),
    "pickle": (lambda content: pickle.dumps(content, 4), "bare pickle"),
    "pickle 0": (lambda content: pickle.dumps(content, 0), "it begins with"),
    "pickle, then zip": (lambda content: pickle.dumps(content, 2) + saved({}), "bare pickle"),
}


@pytest.mark.parametrize(("write", "reason"), FORMATS.values(), ids=FORMATS)
def test_a_planted_file_does_not_run(write, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def never(*_, **__):
        raise AssertionError("torch.load was called")

    marker = tmp_path / "marker"
    data = write({"state_dict": {"weight": torch.zeros(2)}, "meta": Planted(marker)})
    with monkeypatch.context() as patched, pytest.raises(ValueError, match=reason) as caught:
        patched.setattr(torch, "load", never)
        patched.setattr(pickle, "Unpickler", never)
        load(data, tmp_path)
    assert len(str(caught.value).splitlines()) == 1 and not marker.exists()


def test_trust_runs_what_is_in_the_file_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path, marker = tmp_path / "old.pth", tmp_path / "marker"
    torch.save({"a": torch.ones(2), "b": Planted(marker)}, path, _use_new_zipfile_serialization=False)
    with caplog.at_level(logging.WARNING):
        assert safe_load(path, trust=True)["a"].tolist() == [1, 1]
    assert marker.exists() and str(path) in caplog.text and "runs whatever code" in caplog.text
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"old\.pth cannot be read \(torch\.load failed"):
        safe_load(path, trust=True)


def rewritten(data: bytes, change=lambda name, content: [(name, content)], compression=zipfile.ZIP_STORED) -> bytes:
    """The archive with every member replaced by what ``change`` gives for it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for name in old.namelist():
            for member in change(name, old.read(name)):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of names that are there already
                    new.writestr(*member)
    return stream.getvalue()


def instead(suffix: str, *members: tuple[str, bytes]):
    return lambda name, content: list(members) if name.endswith(suffix) else [(name, content)]


GOOD = saved({"a": torch.arange(6.0), "b": torch.ones(3)})
FLAGS = GOOD.index(b"PK\1\2") + 8  # in the directory's first entry
ARCHIVES = {
    "compressed": rewritten(GOOD, compression=zipfile.ZIP_DEFLATED),
    "encrypted": GOOD[:FLAGS] + b"\1" + GOOD[FLAGS + 1 :],
    "two of one name": rewritten(GOOD, lambda name, content: [(name, content)] * 2),
    "absolute name": rewritten(GOOD, instead("version", ("/version", b"3"))),
    "name with ..": rewritten(GOOD, instead("version", ("archive/../version", b"3"))),
    "name with a backslash": rewritten(GOOD, instead("version", ("archive/data\\0", b"3"))),
    "a second folder": rewritten(GOOD, instead("version", ("other/version", b"3"))),
    "no folder": rewritten(GOOD, instead("version", ("version", b"3"))),
    "TorchScript": rewritten(GOOD, instead("version", ("archive/code/a.py", b""))),
    "TorchScript's constants": rewritten(GOOD, instead("version", ("archive/constants.pkl", b"\x80\x02)."))),
    "no pickle": rewritten(GOOD, instead("data.pkl")),
    "no storage": rewritten(GOOD, instead("data/1")),
    "too short a storage": rewritten(GOOD, instead("data/0", ("archive/data/0", bytes(20)))),
    "too long a storage": rewritten(GOOD, instead("data/0", ("archive/data/0", bytes(28)))),
    "big-endian": rewritten(GOOD, instead("byteorder", ("archive/byteorder", b"big"))),
    "a comment": GOOD[:-2] + b"\5\0hello",
    "nothing": b"",
    "an empty archive": b"PK\5\6" + bytes(18),
    "a page of HTML": b"<!DOCTYPE html><title>404</title>",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64,
    "NumPy's archive": (lambda stream: (np.savez(stream, a=np.ones(2)), stream.getvalue())[1])(io.BytesIO()),
}


@pytest.mark.parametrize("data", ARCHIVES.values(), ids=ARCHIVES)
def test_another_archive_is_one_line_of_error(data: bytes, tmp_path: Path):
    with pytest.raises(ValueError, match=r"checkpoint .*file\.pth (is refused|cannot be read)") as caught:
        load(data, tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_members_that_overlap_are_refused(tmp_path: Path):
    data = bytearray(saved([torch.ones(400), torch.zeros(400)]))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        first, second = (archive.getinfo(f"archive/data/{n}") for n in (0, 1))
        entry = data.index(b"PK\1\2", archive.start_dir)
    while data[entry + 46 :][: len(second.filename)] != second.filename.encode():
        entry = data.index(b"PK\1\2", entry + 4)
    data[entry + 20 : entry + 28] = struct.pack("<2I", *[len(data)] * 2)
    with pytest.raises(ValueError, match="members overlap"):
        load(bytes(data), tmp_path)
    assert first.file_size == second.file_size == 1600


def test_every_truncation_is_found(tmp_path: Path):
    assert same(load(rewritten(GOOD), tmp_path), load(GOOD, tmp_path))
    for length in range(0, len(GOOD), 41):
        with pytest.raises(ValueError, match="is refused|cannot be read"):
            load(GOOD[:length], tmp_path)


def test_paths_that_are_no_files(tmp_path: Path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="checkpoint not found"):
            safe_load(path)
    with pytest.raises(ValueError, match="is a URL; download it"):
        safe_load("https://host/file.pth")


def test_tensors_go_where_they_should(tmp_path: Path):
    (tmp_path / "file.pth").write_bytes(saved([torch.ones(3), torch.ones(2).t()]))
    assert {tensor.device.type for tensor in safe_load(tmp_path / "file.pth", "meta")} == {"meta"}
