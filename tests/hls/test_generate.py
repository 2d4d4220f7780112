# SPDX-License-Identifier: Apache-2.0
"""Generated folders: strict templates, equal bytes from equal specs, whole or absent, no trace of the machine."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from distutils.core import run_setup
from pathlib import Path

import numpy as np
import pytest

from ahcq_plugin.export import Spec, SpecError, UnitSpec, save_spec
from ahcq_plugin.hls import HLSOptions, Layer, flow, generate, render, resources, select
from ahcq_plugin.hls.vectors import make_vectors

ROOT = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def layers(cases) -> list[Layer]:
    return [dataclasses.replace(cases.make_layer(name), unit="blocks.0") for name in ("grouped", "hluq", "av_table")]


def test_equal_specs_give_equal_bytes_in_any_place_and_process(cases, layers, tmp_path) -> None:
    spec = Spec((UnitSpec("blocks.0", tuple(layer.matmul for layer in layers), ()),))
    save_spec(spec, tmp_path / "spec")
    first = contents(generate(select(spec), tmp_path / "a" / "layers"))
    command = [sys.executable, "tools/make_hls.py", str(tmp_path / "spec"), "-o", str(tmp_path / "b")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=None)
    assert run.returncode == 0, run.stderr
    second = contents(tmp_path / "b")
    second.pop("report.json")
    assert first == second
    assert contents(generate(select(spec), tmp_path / "a" / "layers")) == first  # over the old folder


def test_nothing_generated_names_a_place_a_date_or_a_version(cases, layers, tmp_path) -> None:
    for name, data in contents(generate(layers, tmp_path / "layers")).items():
        text = data.decode()
        assert str(tmp_path) not in text and str(ROOT) not in text, name
        assert not re.search(r"(?<![\w./*])/(?:\w+/)+\w+|\b20[2-9]\d-\d\d|\b[vV]\d+\.\d", text), name


def test_a_failed_run_leaves_the_old_folder(cases, layers, tmp_path, monkeypatch) -> None:
    folder = generate(layers[:1], tmp_path / "layers")
    before = contents(folder)
    monkeypatch.setattr("ahcq_plugin.hls.emit.make_vectors", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(layers, folder)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["layers"]


def test_a_folder_of_somebody_else_is_left_alone(cases, layers, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(FileExistsError, match="was not written by make_hls"):
        generate(layers, tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"file": b"x"}


def test_templates_take_exactly_their_keys() -> None:
    render.check_keys("t", "{{ a }}{% if b %}{{ c }}{% endif %}", dict(a=1, b=2, c=3))
    with pytest.raises(KeyError, match=r"missing keys \['c'\], unused keys \['d'\]"):
        render.check_keys("t", "{{ a }}{% if b %}{{ c }}{% endif %}", dict(a=1, b=0, d=3))
    with pytest.raises(KeyError, match="unused keys"):
        render.render("hluq_members.j2", dict(log_levels=3, groups=2))


@pytest.mark.parametrize("value", [0.1, 1e-30, 3.0, 16777216.0, 1.17549435e-38, 3.4028235e38, -0.5, 1e-45])
def test_a_float_literal_gives_the_same_float(value: float) -> None:
    text = render.literal(np.float32(value))
    assert text.endswith("f") and re.search(r"[.e]", text) and np.float32(text[:-1]) == np.float32(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(pe=10, out=4), "`pe` must be a multiple of `out`"),
        (dict(pe=0), r"`pe` must be an integer in \[1, 1024\], got 0"),
        (dict(simd=2.5), "`simd` must be an integer"),
        (dict(part="x; exit"), "`part` must be the name of an FPGA part"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        HLSOptions(**options)


def test_layers_that_do_not_fit_are_named(cases, tmp_path) -> None:
    layer = cases.make_layer("uniform_8")
    with pytest.raises(SpecError, match=r"'uniform_8': `simd` 16 times 8-bit weights.*use `simd` <= 8"):
        generate([dataclasses.replace(layer, options=HLSOptions(simd=16))], tmp_path / "x")
    twin = dataclasses.replace(layer, matmul=dataclasses.replace(layer.matmul, name="Uniform.8"))
    with pytest.raises(SpecError, match="same C\\+\\+ name"):
        generate([layer, twin], tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_select_finds_units_and_matmuls(layers) -> None:
    spec = Spec((UnitSpec("blocks.0", tuple(layer.matmul for layer in layers), ()),))
    assert [layer.matmul.name for layer in select(spec, ["blocks.*.hluq"])] == ["hluq"]
    assert len(select(spec, ["blocks.0"])) == 3
    with pytest.raises(SpecError, match="'blocks.7' matches no unit.*units: blocks.0"):
        select(spec, ["blocks.7"])


def test_the_generated_test_bench_passes_and_sees_wrong_vectors(cases, tmp_path) -> None:
    layer = dataclasses.replace(cases.make_layer("av_table"), vectors=None)
    folder = generate([layer], tmp_path / "layers")
    passed, said = flow.run_testbench(layer, folder)
    assert passed and "PASSED" in said, said
    golden_file = folder / layer.top / "golden.dat"
    text = golden_file.read_text(encoding="utf-8")
    for name in ("accumulators", "out", "left_quantizer_codes"):
        lines = text.splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{name} ")) + 1
        numbers = lines[at].split()
        numbers[-1] = str((int(numbers[-1]) + 1) % 8)
        golden_file.write_text("\n".join([*lines[:at], " ".join(numbers), *lines[at + 1 :]]), encoding="utf-8")
        run = subprocess.run(["./testbench"], cwd=folder / layer.top, capture_output=True, text=True)
        assert run.returncode == 1 and "FAILED" in run.stdout and "1 differ" in run.stdout
    golden_file.write_text(text[: len(text) // 2], encoding="utf-8")
    assert subprocess.run(["./testbench"], cwd=folder / layer.top, capture_output=True).returncode == 1
    golden_file.unlink()
    assert subprocess.run(["./testbench"], cwd=folder / layer.top, capture_output=True).returncode == 1


def test_own_vectors_go_into_the_test_bench(cases, tmp_path) -> None:
    layer = cases.make_layer("uniform")
    vectors = make_vectors(layer.matmul, 1, 3, seed=8)
    folder = generate([dataclasses.replace(layer, vectors=vectors)], tmp_path / "layers")
    lines = (folder / layer.top / "golden.dat").read_text(encoding="utf-8").splitlines()
    assert lines[1] == "1 3" and lines[3] == " ".join(map(str, vectors.left.ravel()))


def test_a_missing_source_folder_or_hls4ml_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(resources, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(resources, "_PACKAGED", tmp_path / "sources")
    with pytest.raises(FileNotFoundError, match="install the package again from a full checkout"):
        resources.sources("include")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install ahcq_plugin\[hls\]"):
        resources.ap_types()


def test_an_installation_carries_every_hardware_source(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    build = run_setup("setup.py", stop_after="init").get_command_obj("build_py")
    build.ensure_finalized()
    (names,) = (names for package, _, _, names in build.data_files if package == "ahcq_plugin.hls.sources")
    files = {path for path in (ROOT / "hls").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert files <= {ROOT / name for name in names} | {ROOT / "hls" / name for name in names} and len(files) > 30


def test_the_tool_says_what_is_wrong(tmp_path) -> None:
    for arguments, message in (
        (["nowhere", "-o", str(tmp_path / "x")], "no spec at"),
        ([str(tmp_path), "-o", str(tmp_path / "x"), "--synth"], "vitis_hls is not on PATH"),
    ):
        run = subprocess.run(
            [sys.executable, "tools/make_hls.py", *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert run.returncode == 2 and message in run.stderr and "Traceback" not in run.stderr
