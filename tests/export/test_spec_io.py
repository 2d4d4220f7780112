# SPDX-License-Identifier: Apache-2.0
"""Specs on disk: what is read is what was written, bytes are reproducible, damage gets a clear error."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ahcq_plugin.export import Patches, Spec, SpecError, Step, UnitSpec, load_spec, save_spec, spec_io
from ahcq_plugin.support.files import json_checksum
from tests.export import specs


def make_spec(seed: int = 0) -> Spec:
    """A unit with every kind and family, another one with a convolution."""
    rng = np.random.default_rng(seed)
    bits, k, n = int(rng.integers(2, 9)), int(rng.integers(1, 12)), int(rng.integers(1, 5))
    matmuls = [specs.make_linear(f, bits, k, n, rng, w_bits=int(rng.integers(2, 9))) for f in specs.LEFT_FAMILIES]
    matmuls += [
        specs.make_product("qk", "uniform", bits, k, n, rng),
        specs.make_product("av", "table", bits, k, n, rng),
        specs.make_product("qk", "per_head", bits, k, n, rng, right_family="per_head"),
        specs.make_product("av", "table", bits, k, n, rng, right_family="per_head"),
    ]
    matmuls = [dataclasses.replace(m, name=f"m{i}") for i, m in enumerate(matmuls)]
    conv = dataclasses.replace(
        specs.make_linear("uniform", bits, 9 * k, n, rng), patches=Patches(k, (3, 3), (1, 2), (1, 0))
    )
    steps = [Step("x", "input", ()), *(Step(m.name, "matmul", ("x",), m.name, ("x",)) for m in matmuls)]
    steps.append(Step("out", "softmax", ("m0", "m1")))
    units = (UnitSpec("enc.0", tuple(matmuls), tuple(steps)), UnitSpec("neck", (conv,), ()))
    return Spec(units, ("enc.0.conv: a convolution with groups 4",))


def same(a, b) -> bool:
    """Equal to the bit and in type, through dataclasses, tuples and arrays."""
    if type(a) is not type(b):
        return False
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return a == b


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_round_trip_and_equal_bytes(seed, tmp_path_factory):
    folder, spec = tmp_path_factory.mktemp("spec"), make_spec(seed)
    assert save_spec(spec, folder / "a") == folder / "a" / "spec.json"
    loaded = load_spec(folder / "a")
    assert same(loaded, spec) and same(load_spec(folder / "a" / "spec.json"), spec)
    save_spec(loaded, folder / "b")
    assert files(folder / "a") == files(folder / "b")


def test_weights_are_packed(tmp_path):
    matmul = specs.make_linear("uniform", 3, 500, 40, np.random.default_rng(0))
    save_spec(Spec((UnitSpec("u", (matmul,), ()),)), tmp_path)
    (tensors,) = tmp_path.glob("tensors-*")
    assert tensors.stat().st_size < 500 * 40 * 3 / 8 + 1500


def test_a_new_spec_replaces_the_old_one_as_a_whole(tmp_path, monkeypatch):
    old, new = make_spec(1), make_spec(2)
    save_spec(old, tmp_path)
    before = files(tmp_path)

    def fail(path):
        raise OSError("disk full")

    real = spec_io.replacing
    monkeypatch.setattr(spec_io, "replacing", lambda path: fail(path) if path.name == "spec.json" else real(path))
    with pytest.raises(OSError, match="disk full"):
        save_spec(new, tmp_path)
    assert same(load_spec(tmp_path), old) and files(tmp_path).items() >= before.items()
    monkeypatch.undo()
    save_spec(new, tmp_path)
    assert same(load_spec(tmp_path), new) and len(files(tmp_path)) == 2


def test_a_spec_of_the_former_format_still_reads(tmp_path):
    """As the code before operands per head wrote it: another label, no such family, no groups of convolutions."""
    spec = make_spec(3)
    old = UnitSpec("enc.0", spec.units[0].matmuls[:6], ())
    save_spec(Spec((old, spec.units[1])), tmp_path)

    def former(content):
        content["format"] = "ahcq_plugin.spec/1"
        assert content["units"][1]["matmuls"][0]["patches"].pop("groups") == 1

    edit(tmp_path, former)
    assert same(load_spec(tmp_path), Spec((old, spec.units[1])))
    save_spec(load_spec(tmp_path), tmp_path)
    assert json.loads((tmp_path / "spec.json").read_text())["format"] == "ahcq_plugin.spec/2"


def edit(folder: Path, change) -> None:
    content = json.loads((folder / "spec.json").read_text())
    change(content)
    content["checksum"] = json_checksum(content)
    (folder / "spec.json").write_text(json.dumps(content))


def matmul(content, index=0):
    return content["units"][0]["matmuls"][index]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(format="ahcq_plugin.spec/9"), "has the format 'ahcq_plugin.spec/9', this version reads"),
        (lambda c: c.update(extra=1), r"spec: unknown keys \['extra'\]"),
        (lambda c: c.pop("units"), r"missing keys \['units'\]"),
        (lambda c: matmul(c).update(zero=1), r"unit 'enc.0', matmul 'm0': .*unknown keys \['zero'\]"),
        (lambda c: matmul(c)["left"].update(family="log"), "unknown family 'log'; allowed: uniform, grouped"),
        (lambda c: matmul(c)["left"].pop("scale"), r"UniformOperand: .*missing keys \['scale'\]"),
        (lambda c: matmul(c)["left"].update(scale=0.1), "must be a float32 number, got 0.1"),
        (lambda c: matmul(c)["left"].update(scale="1"), "must be a float32 number, got '1'"),
        (lambda c: matmul(c).update(bias=0), "`Matmul.bias` must be of type"),
        (lambda c: matmul(c).update(k="6"), "`Matmul.k` must be of type int"),
        (lambda c: matmul(c)["right"].update(shape=[3]), r"`shape` of a weight must be \[n, k\], got \[3\]"),
        (lambda c: matmul(c)["right"]["shape"].reverse(), "`scales` must be|weight has shape|codes of"),
        (lambda c: matmul(c).update(accumulator_bits=2), "`accumulator_bits` is 2, too narrow"),
        (lambda c: matmul(c).update(name="other"), "the tensor 'enc.0/other/.*' is missing"),
        (lambda c: c["units"].pop(), "has tensors that nothing uses: neck/matmul_1"),
        (lambda c: c["units"][0]["steps"][1].update(matmul="m9"), "names the matmul 'm9'"),
        (lambda c: c["units"][0]["steps"][1].update(inputs=["z"]), "reads z, which no earlier step gives"),
        (lambda c: c["units"][0]["steps"].insert(0, c["units"][0]["steps"][0]), "the name is taken"),
        (lambda c: c["units"].append("unit"), "a unit must be an object, got 'unit'"),
        (lambda c: c.update(tensors="absent.safetensors"), "tensor file absent.safetensors is missing"),
    ],
)
def test_a_changed_json_is_refused(change, message, tmp_path):
    save_spec(make_spec(0), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(SpecError, match=f"(?s)spec.json.*{message}"):
        load_spec(tmp_path)


def test_a_number_that_would_be_right_too_is_found_by_the_checksum(tmp_path):
    save_spec(make_spec(0), tmp_path)
    path = tmp_path / "spec.json"
    content = json.loads(path.read_text())
    matmul(content)["m"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(SpecError, match="spec.json: it does not match its checksum"):
        load_spec(tmp_path)
    del content["checksum"]  # as files of before it are
    path.write_text(json.dumps(content))
    assert load_spec(tmp_path).units[0].matmuls[0].m == matmul(content)["m"]


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_truncated_files_are_refused(length, tmp_path):
    save_spec(make_spec(0), tmp_path)
    (tensors,) = tmp_path.glob("*.safetensors")
    data = tensors.read_bytes()
    tensors.write_bytes(data[:length])
    with pytest.raises(SpecError, match="tensors-.* is truncated or was changed: SHA-256"):
        load_spec(tmp_path)
    tensors.write_bytes(data)
    text = (tmp_path / "spec.json").read_bytes()
    (tmp_path / "spec.json").write_bytes(text[: length - 1 if length < 0 else length])
    with pytest.raises(SpecError, match=r"not valid JSON \(truncated\?\)"):
        load_spec(tmp_path)


def test_wrong_tables_in_the_tensor_file_are_refused(tmp_path, monkeypatch):
    """Even with the right checksum: unsorted thresholds, a wrong permutation."""
    spec = make_spec(0)
    for name, field, message in (("m2", "boundaries", "must ascend"), ("m1", "permutation", "once")):
        operand = spec["enc.0"][name].left
        values = getattr(operand, field)
        saved, values[:] = values.copy(), values[::-1].copy() if field == "boundaries" else values[0]
        save_spec(spec, tmp_path)
        with pytest.raises(SpecError, match=f"unit 'enc.0', matmul '{name}'.*{message}"):
            load_spec(tmp_path)
        values[:] = saved


def test_missing_specs_and_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="no spec at .*spec.json: write one with export_spec"):
        load_spec(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SpecError, match="a spec is a folder"):
        save_spec(make_spec(), tmp_path / "file")
    with pytest.raises(SpecError, match="the spec has no unit 'x'; it has enc.0, neck"):
        make_spec()["x"]
    with pytest.raises(SpecError, match="unit 'neck' has no matmul 'x'; it has matmul_1"):
        make_spec()["neck"]["x"]
