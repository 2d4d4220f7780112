# SPDX-License-Identifier: Apache-2.0
"""Planted pickles: every one is refused by name or read as plain values, and none runs."""

import io
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from ahcq_plugin.support.pickled_values import Inert, Refused
from ahcq_plugin.support.unpickle import drop_inert, unpickle

START, STOP = b"\x80\x02", b"."
EMPTY_HOOKS = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    content = value.to_bytes(12, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def storage(elements: int = 4, key: str = "0", kind: str = "FloatStorage") -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(elements) + b"tQ"


def tensor(
    offset: int, size: list[int], stride: list[int], content: bytes | None = None, flag: bytes = b"\x89"
) -> bytes:
    shape = b"".join(b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (size, stride))
    content = storage() if content is None else content
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + content + number(offset) + shape + flag + EMPTY_HOOKS + b"tR"


def read(body: bytes):
    def four_floats(key: str, dtype: torch.dtype, elements: int) -> torch.UntypedStorage:
        if (key, elements) != ("0", 4):
            raise ValueError(f"no storage {key} of {elements} elements")
        return torch.arange(4.0).untyped_storage()

    content = unpickle(io.BytesIO(START + body + STOP), four_floats)
    drop_inert(content)
    return content


def no_storage(*_):
    raise AssertionError("there is no storage in it")


class Planted:
    """Pickled as a call that writes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"echo run > {self.marker}",)


class Chain:
    """Pickled as getattr(getattr(...), ...)."""

    def __reduce__(self):
        return getattr, (OrderedDict, "__subclasses__")


def test_a_planted_call_is_named_and_not_run(tmp_path: Path):
    marker = tmp_path / "marker"
    objects = np.array([Planted(marker), None], dtype=object)
    contents = [Planted(marker), [Planted(marker)], {"state_dict": {"a": Planted(marker)}}, {"meta": objects}]
    for content in contents:
        data = pickle.dumps(content, protocol=2)
        with pytest.raises(Refused, match=r"asks for '(posix|nt)\.system', .* may be malicious"):
            unpickle(io.BytesIO(data), no_storage)
        assert not marker.exists()
        pickle.loads(data)
        assert marker.exists(), "the payload itself does not work"
        marker.unlink()


def test_getattr_of_anything_but_a_left_out_class_is_refused():
    with pytest.raises(Refused, match=r"getattr of collections\.OrderedDict"):
        unpickle(io.BytesIO(pickle.dumps(Chain(), protocol=2)), no_storage)


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_other_protocols_are_refused(protocol: int):
    with pytest.raises(Refused, match="protocol 2"):
        unpickle(io.BytesIO(pickle.dumps({"a": [1, 2]}, protocol)), no_storage)


RUN = text("echo run")
REFUSED = {
    "protocol within": b"\x80\x02N",
    "GLOBAL": b"cos\nsystem\n",
    "GLOBAL, escaped": b"c\\x6fs\nsystem\n",
    "GLOBAL, with a line of its own": b"cbuiltins\neval\n",
    "GLOBAL of a method": b"ccollections\nOrderedDict.fromkeys\n",
    "GLOBAL of torch": b"ctorch\nload\n",
    "GLOBAL of a quantized tensor": b"ctorch._utils\n_rebuild_qtensor\n",
    "GLOBAL of a sparse tensor": b"ctorch._utils\n_rebuild_sparse_tensor\n",
    "GLOBAL of a tensor's class": b"ctorch._tensor\n_rebuild_from_type_v2\n",
    "STACK_GLOBAL": text("os") + text("system") + b"\x93",
    "STACK_GLOBAL from the memo": text("system") + b"q\x000" + text("os") + b"h\x00\x93",
    "MEMOIZE": text("os") + b"\x94",
    "INST": b"(" + RUN + b"ios\nsystem\n",
    "OBJ": b"(cos\nsystem\n" + RUN + b"o",
    "OBJ of an allowed name": b"(ccollections\nOrderedDict\no",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "NEWOBJ": b"ccollections\nOrderedDict\n)\x81",
    "NEWOBJ_EX": b"ccollections\nOrderedDict\n)}\x92",
    "PERSID": b"P0\n",
    "BINPERSID of text": text("storage") + b"Q",
    "BINPERSID of another kind": b"(" + text("module") + b"NNNNtQ",
    "NEXT_BUFFER": b"\x97",
    "DUP": b"}2",
    "PUT, text": b"}p0\n",
    "INT, text": b"I1\n",
    "call of what was called": b"ccollections\nOrderedDict\n)R)R",
    "call of text": text("os.system") + RUN + b"\x85R",
    "call of a storage class": b"ctorch\nFloatStorage\n)R",
    "call with a list": b"ccollections\nOrderedDict\n]R",
    "BUILD of a name": b"ccollections\nOrderedDict\n}" + text("fromkeys") + b"NsNb",
    "BUILD of a name, slots": b"ccollections\nOrderedDict\nN}" + text("update") + b"Ns\x86b",
    "BUILD of a function": b"ctorch._utils\n_rebuild_parameter\n}" + text("__code__") + b"Nsb",
    "BUILD of a tensor": tensor(0, [4], [1]) + b"}" + text("__class__") + b"Nsb",
    "BUILD of a dict": b"}}" + text("keys") + b"Nsb",
    "BUILD of an OrderedDict": EMPTY_HOOKS + b"}" + text("items") + b"Nsb",
    "BUILD with metadata of another kind": EMPTY_HOOKS + b"}" + text("_metadata") + text("x") + b"sb",
    "BUILD of an object dtype": b"cnumpy\ndtype\n" + text("f8") + b"\x85R(K\x03" + text(">") + b"NNNtb",
    "item of a tensor": tensor(0, [4], [1]) + b"K\x00K\x01s",
    "append to a tuple": b")K\x01a",
    "key that is a list": b"}]Ns",
    "key that is a tuple of tuples": b"})\x85Ns",
    "bytes of another encoding": b"c_codecs\nencode\n" + text("x") + text("rot13") + b"\x86R",
    "Counter of text": b"ccollections\nCounter\n" + text("x") + b"\x85R",
    "torch.Size of text": b"ctorch\nSize\n" + text("x") + b"\x85R",
    "torch.device of a list": b"ctorch\ndevice\n]\x85R",
    "bare name": b"ccollections\nOrderedDict\n",
    "bare name in a dict": b"}K\x01ccollections\nOrderedDict\ns",
    "bare storage": storage(),
    "storage of a quantized type": storage(kind="QInt8Storage"),
    "storage with two types": b"(" + tensor(0, [4], [1]) + tensor(0, [2], [1], storage(kind="LongStorage")) + b"t",
    "Parameter of text": b"ctorch._utils\n_rebuild_parameter\n(" + text("x") + b"\x88" + EMPTY_HOOKS + b"tR",
    "tensor of text": tensor(0, [4], [1], text("x")),
    "tensor outside its storage": tensor(0, [5], [1]),
    "tensor with an offset outside": tensor(4, [1], [1]),
    "tensor with a stride outside": tensor(1, [2], [3]),
    "tensor with a stride that overflows": tensor(0, [3], [2**61]),
    "tensor with a huge size": tensor(0, [2**70], [1]),
    "tensor with a negative size": tensor(0, [-1], [1]),
    "tensor with two negative sizes": tensor(0, [-2, -2], [1, 1]),
    "tensor with a negative stride": tensor(3, [4], [-1]),
    "tensor with a negative offset": tensor(-1, [1], [1]),
    "tensor with fewer strides": tensor(0, [2, 2], [1]),
    "tensor that repeats one element": tensor(0, [2**40], [0]),
    "tensor with requires_grad=1": tensor(0, [4], [1], flag=b"K\x01"),
    "list that holds itself": b"]q\x00h\x00a",
    "dict that holds itself": b"}q\x00" + text("a") + b"h\x00s",
    "tuple within tuple": b")" + b"\x85" * 10_000,
    "list within list": b"]" * 10_000 + b"a" * 9_999,
    "tuples that double": b")" + b"q\x00h\x00\x86" * 90,
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_it_is_refused(body: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ahcq_plugin.support.unpickle.MAX_ITEMS", 100_000)
    with pytest.raises(Refused) as caught:
        read(body)
    assert len(str(caught.value).splitlines()) == 1


DAMAGED = {
    "huge storage": tensor(0, [4], [1], storage(2**50)),
    "negative storage": tensor(0, [4], [1], storage(-4)),
    "no storage": tensor(0, [4], [1], storage(key="../0")),
    "empty stack": b"0",
    "memo that is not there": b"h\x07",
    "no mark": b"t",
    "mark without end": b"(",
    "two objects": b"NN",
    "half an item": b"}(Nu",
    "unknown opcode": b"\xff",
    "text that ends early": b"X\xff\xff\xff\x7fabc",
    "text that is not UTF-8": b"X\x01\x00\x00\x00\xff",
    "too few arguments": b"ctorch._utils\n_rebuild_tensor_v2\n)R",
    "gradient of integers": tensor(0, [4], [1], storage(kind="IntStorage"), flag=b"\x88"),
    "device that is not known": b"ctorch\ndevice\n" + text("nowhere") + b"\x85R",
}


@pytest.mark.parametrize("body", DAMAGED.values(), ids=DAMAGED)
def test_it_is_found_to_be_damaged(body: bytes):
    with pytest.raises((ValueError, LookupError, TypeError, RuntimeError, OverflowError)):
        read(body)


@pytest.mark.parametrize("cut", range(0, 180, 7))
def test_a_pickle_that_ends_early_is_an_error(cut: int):
    with pytest.raises((ValueError, LookupError)):
        unpickle(io.BytesIO((START + tensor(0, [4], [1]))[:cut]), lambda *_: torch.arange(4.0).untyped_storage())


def test_tensors_and_aliases_are_what_they_should_be():
    found = read(tensor(1, [2], [2]))
    assert found.tolist() == [1, 3] and found.storage_offset() == 1 and found.untyped_storage().nbytes() == 16
    assert read(tensor(9, [0, 3], [3, 1])).shape == (0, 3)
    pair = read(b"(" + tensor(0, [4], [1]) + b"q\x07" + tensor(0, [2], [1]) + b"h\x07t")
    assert pair[0] is pair[2] and pair[1].data_ptr() == pair[0].data_ptr()
    shared = read(b"(]q\x00h\x00t")
    assert shared == ([], []) and shared[0] is shared[1]


def test_objects_that_nobody_needs_are_left_out_with_their_entry():
    made = b"cargparse\nNamespace\n)\x81}" + text("__class__") + b"cargparse\nNamespace\nsb"
    found = read(b"}(" + text("args") + b"]" + made + b"a" + text("model") + tensor(0, [4], [1]) + b"u")
    assert list(found) == ["model"]
    with pytest.raises(Refused, match=r"argparse\.Namespace where"):
        read(made)
    content = unpickle(io.BytesIO(START + made + STOP), no_storage)
    assert type(content) is Inert and vars(content) == {"name": "argparse.Namespace"}


def test_a_pickle_that_goes_on_and_on_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ahcq_plugin.support.unpickle.MAX_OPCODES", 1000)
    with pytest.raises(Refused, match="more than 1000 opcodes"):
        read(b"]" + b"Na" * 600)


def test_plain_values_come_back():
    values = [None, True, -3, 2**70, 0.5, "é", b"\x00\xff", b"", (), (1,), [1, [2]], {"a": {1: 2}, None: 3}]
    assert unpickle(io.BytesIO(pickle.dumps(values, 2)), no_storage) == values
