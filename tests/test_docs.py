# SPDX-License-Identifier: Apache-2.0
"""Every Python example runs: those of README and docs/, cut down where they would take minutes, and all of docstrings.

The texts are run as they stand but for the named replacements; the tests marked ``slow`` replace nothing.
"""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
MARKDOWN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {
    "docs/mqbench.md": "tests/mqbench/test_mqbench_docs.py",  # needs the real MQBench
    "docs/hls_rtl.md": "tests/hls/rtl/test_docs_example.py",
}
PYTHON = (
    *("README.md", "docs/checkpoints.md", "docs/engine.md", "docs/export.md", "docs/hls.md", "docs/integer.md"),
    *("docs/sam2.md", "docs/softmax.md"),
)
CONFIGS = ("README.md", "docs/mmdet.md")
# of configs: the small SAM and a small detector, rounding to nearest
SMALLER = {
    'name="vit_b", checkpoint="checkpoints/sam_vit_b_01ec64.pth"': 'name="sam_tiny"',
    'recipe = dict(name="ahcq"': 'recipe = dict(name="rtn"',
    'recipe=dict(name="ahcq"': 'recipe=dict(name="rtn"',
    "yolox_l_8xb8": "yolox_tiny_8xb8",
}


def blocks(path: str) -> list[str]:
    """The Python blocks of a markdown file."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def code(path: str) -> str:
    """The blocks of ``path`` that are no config, as one program."""
    return "\n".join(block for block in blocks(path) if "_base_" not in block)


def config(path: str) -> str:
    """The one block of ``path`` that is a config."""
    (text,) = (block for block in blocks(path) if "_base_" in block)
    return text


def replaced(text: str, replacements: dict[str, str]) -> str:
    """``text`` with each old text, which must be there, replaced by the new one."""
    for old, new in replacements.items():
        assert old in text, f"{old!r} is no longer in the example: adapt the replacement"
        text = text.replace(old, new)
    return text


def run(source: str, **names) -> dict:
    """The names after ``source`` ran with ``names``."""
    namespace = {"__name__": "example", "print": lambda *line: None, **names}
    exec(compile(source, "example", "exec"), namespace)
    return namespace


def doctests(module) -> doctest.TestResults:
    return doctest.testmod(module, optionflags=doctest.ELLIPSIS)


def test_no_example_is_forgotten() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in MARKDOWN}
    assert {path for path in files if blocks(path)} == {*PYTHON, *CONFIGS, *ELSEWHERE}
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())


def test_readme(tiny_sam, monkeypatch) -> None:
    monkeypatch.setattr("ahcq_plugin.zoo.sam.build_sam", lambda name: tiny_sam)
    names = run(replaced(code("README.md"), {"iterations=100": "iterations=2", "range(8)": "range(2)"}))
    assert names["report"].audit.passed and names["masks"].isfinite().all()


@pytest.mark.slow
def test_readme_as_it_stands() -> None:
    names = run(code("README.md"))
    assert names["report"].audit.passed and names["masks"].isfinite().all()


def test_export_and_hls(tiny_sam, tiny_items, tmp_path, monkeypatch) -> None:
    from ahcq_plugin.zoo.sam import box_forward

    monkeypatch.chdir(tmp_path)
    source = replaced(code("docs/export.md"), {'"ahcq", w_bits': '"ahcq", iterations=2, w_bits'})
    codes = torch.zeros(3, 32, dtype=torch.long).numpy()
    packed = replaced(code("docs/checkpoints.md"), {'"ahcq", w_bits': '"rtn", w_bits', 'build_sam("sam_tiny")': "sam"})
    names = run(packed, sam=tiny_sam, batches=tiny_items[:1])
    assert names["qsam"] is not tiny_sam and (tmp_path / "quantized.safetensors").is_file()
    names = run(source, sam=tiny_sam, batches=tiny_items, box_forward=box_forward, codes=codes)
    assert names["masks"].shape == (3, 48, 64) and (tmp_path / "bundle" / "bundle.json").is_file()
    assert names["frame"] == 2 and names["shown"].shape == (1, 48, 64)
    assert names["result"].output.shape == (3, 96) and sorted(tmp_path.glob("onnx/*.onnx"))
    rows = run(code("docs/engine.md"), qmodel=names["qmodel"], batch=tiny_items[0], box_forward=box_forward)["rows"]
    assert rows and not any(row.different for row in rows.values())
    given = {"qmodel": names["qmodel"], "spec": names["spec"], "batch": tiny_items[0], "box_forward": box_forward}
    on_tables = run(code("docs/softmax.md"), **given)
    assert on_tables["rows"] and all(not row.reason for row in on_tables["rows"].values())
    checked = on_tables["checked"]
    assert not any(row.different for row in checked.values())
    host = {unit for (unit, _), row in checked.items() if row.reason}
    assert all(unit.startswith("image_encoder.") for unit in host), "relative positions; the decoder has none"
    x = torch.rand(1, 64).numpy()
    project = run(code("docs/hls.md"), torch=torch, spec=names["spec"], x=x)
    assert (project["y"] == project["leaf"](torch.from_numpy(x)).detach().numpy()).all()


def test_sam2(small_sam2, small_clips, monkeypatch) -> None:
    monkeypatch.setattr("ahcq_plugin.zoo.sam2.build_sam2", lambda name: small_sam2)
    source = replaced(code("docs/sam2.md"), {'"ahcq", forward': '"ahcq", iterations=2, forward'})
    names = run(source, **small_clips[0])
    assert names["report"].audit.passed


def test_integer(tiny_sam, tiny_items, monkeypatch) -> None:
    from ahcq_plugin import quantize
    from ahcq_plugin.zoo.sam import box_forward

    settings = {"name": "rtn", "granularity": "none"}
    qmodel = quantize(tiny_sam, tiny_items[:1], settings, 4, 4, forward=box_forward, progress=False)[0]
    monkeypatch.setattr("ahcq_plugin.load_quantized", lambda path: qmodel)
    predictor = run(code("docs/integer.md"))["predictor"]
    predictor.set_image(torch.zeros(32, 64, 3, dtype=torch.uint8).numpy())
    assert predictor.get_image_embedding().isfinite().all()


@pytest.mark.parametrize("path", CONFIGS)
@pytest.mark.parametrize("smaller", [SMALLER, pytest.param({}, marks=pytest.mark.slow)], ids=["small", "as it stands"])
def test_configs_pass_a_dry_run(path, smaller, tmp_path) -> None:
    text = config(path)
    (tmp_path / "my_config.py").write_text(replaced(text, {old: smaller[old] for old in smaller if old in text}))
    command = [sys.executable, ROOT / "tools" / "ptq.py", "my_config.py", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "audit passed" in done.stdout, done.stdout + done.stderr


def test_docstrings() -> None:
    paths = [path for path in (ROOT / "ahcq_plugin").rglob("*.py") if ">>>" in path.read_text(encoding="utf-8")]
    for path in paths:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        results = doctests(importlib.import_module(name))
        assert results.attempted and not results.failed, name


def test_a_wrong_docstring_is_caught(tmp_path, monkeypatch) -> None:
    (tmp_path / "planted_example.py").write_text('"""\n>>> 1 + 1\n3\n"""\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert doctests(importlib.import_module("planted_example")).failed == 1
