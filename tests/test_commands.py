# SPDX-License-Identifier: Apache-2.0
"""Commands of README and docs: each tool starts in a process of its own and knows what the docs give it."""

import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image

from ahcq_plugin.zoo.scenes import write_coco
from tests.robustness.materials import Materials, make_materials
from tests.robustness.zygote import Zygote

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DEMO = "mm_configs/demo_sam_tiny_w4a4.py"
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py") if path.name != "build_mmcv.py")  # installs


def documented() -> dict[str, set[str]]:
    """Tool -> the options that README and docs call it with."""
    options: dict[str, set[str]] = defaultdict(set)
    for page in PAGES:
        for line in re.findall(r"python (tools/[^`#\n|]*)", page.read_text(encoding="utf-8")):
            tool, *words = shlex.split(line.replace("'", ""))
            options[Path(tool).name] |= {word for word in words if word.startswith("-")}
    return options


def run(*command: str, cwd: Path = ROOT) -> str:
    """What the tool printed; it must end well."""
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def test_documented_tools_exist() -> None:
    assert len(documented()) > 10 and set(documented()) <= {*TOOLS, "build_mmcv.py"}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_starts_alone_and_knows_its_documented_options(tool: str) -> None:
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", run(f"tools/{tool}", "--help")))
    assert documented().get(tool, set()) <= known


@pytest.mark.slow
def test_the_documented_way_from_a_run_to_hardware(tmp_path: Path) -> None:
    demo, image = tmp_path / "demo", tmp_path / "image.png"
    quick = ["--cfg-options", "recipe.iterations=2"]
    printed = run("tools/ptq.py", "mm_configs/demo_sam_tiny_w4a4.py", "--work-dir", str(demo), *quick)
    assert "audit passed" in printed and "integers: " in printed and (demo / "quantized.pth").is_file()
    run("tools/export.py", str(demo / "quantized.pth"), "-o", str(tmp_path / "spec"))
    layers = ["--layers", "image_encoder.blocks.0", "--csim"]
    run("tools/make_hls.py", str(tmp_path / "spec"), "-o", str(tmp_path / "cpp"), *layers)
    assert list((tmp_path / "cpp").rglob("*.cpp"))
    Image.new("RGB", (80, 60), (90, 120, 30)).save(image)
    picture = ["--box", "10,10,50,50", "--out", str(tmp_path / "compare.png")]
    assert "IoU to FP" in run("tools/compare.py", str(image), str(demo / "quantized.pth"), *picture)


#: Tools that documents call and no other test runs -> arguments with which they take seconds; {coco} is a COCO folder.
SMALL = {
    "bench_acnr.py": "--shapes 64x32 --chunks 1 --timed 1",
    "bench_inference.py": "--models sam_tiny --variants pytorch-fp32 --boxes 1 --repeats 1 --images 1 --work {out}",
    "bench_integer.py": "--model sam_tiny --recipes rtn:8 --boxes 1 --repeats 1",
    "bench_memory.py": "--boxes 1 2",
    "bench_quantizers.py": "--shape 16 8 --repeat 1",
    "bench_range_search.py": "--shapes 32x32",
    "bench_video.py": "--models sam2_tiny --recipes rtn --frames 3",
    "challenges.py": "",
    "compare_cag_clustering.py": "--images 3 --bits 4 --groups 2",
    "coverage_table.py": "--models sam_tiny --out {out}/coverage.md",
    "eval_sam_tiny.py": "--out {out}",
    "eval_sam2_tiny.py": "--clips 1 --work-dir {out} --out {out}/figures.json",
    "fetch_weights.py": "--list",
    "hw_model.py": "--models vit_b --boxes 1 --cells 2",
    "plot_distributions.py": "--images 1 --boxes 1 --out {out}",
    "prompt_errors.py": "--calibrate {coco} --coco {coco} --bits 8 --images 5 --objects 1",
    "results_table.py": "--table recipes",
    "role_sensitivity.py": "--recipe rtn --calibration 1 --images 1 --boxes 1",
    "sam_tiny_stats.py": "--images 1 --out {out}",
    "train_sam_tiny.py": "--scenes-only --steps 1 --batch 1 --out {out}",
    "train_sam2_tiny.py": "--scenes-only --steps 1 --batch 1 --out {out}",
}


#: Tools that read what a run wrote: {run} has its files, {spec} is its spec.
OF_A_RUN = {
    "compare_golden.py": "{run}/quantized.pth {spec} --images 1",
    "demo_hls.py": "{run}/quantized.pth -o {out}/demo --images 1",
    "evaluate.py": "{config} {run}/quantized.safetensors --work-dir {out}",
    "export_bundle.py": "{run}/quantized.pth -o {out}/bundle --images 1 --runs 1",
    "time_image.py": "{run}/quantized.safetensors --boxes 1 --repeats 1",
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is committed, and nothing else."""
    folder = tmp_path_factory.mktemp("clone") / "ahcq"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("tool", SMALL)
def test_other_tools_run_from_a_clean_clone(
    tool: str, clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(clone))
    coco = write_coco(tmp_path / "coco", 5, seed=5).parent
    out = tmp_path / "out"
    out.mkdir()
    assert run(f"tools/{tool}", *SMALL[tool].format(out=out, coco=coco).split(), cwd=clone)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    """A run, and the spec of its model."""
    with Zygote() as zygote:
        return make_materials(tmp_path_factory.mktemp("made"), zygote)


@pytest.mark.slow
@pytest.mark.parametrize("tool", OF_A_RUN)
def test_tools_on_a_run_from_a_clean_clone(
    tool: str, clone: Path, made: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(clone))
    places = {"run": made.run, "spec": made.spec, "config": made.config, "out": tmp_path}
    assert run(f"tools/{tool}", *OF_A_RUN[tool].format(**places).split(), cwd=clone)


@pytest.mark.slow
def test_converters_from_a_clean_clone(
    clone: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(clone))
    onnx = shared_data / "yolox_nano" / "yolox_nano.onnx"
    assert "113 convolutions" in run("tools/convert_yolox.py", str(onnx), str(tmp_path / "nano.pth"), cwd=clone)


def documented_runs() -> list[str]:
    """Arguments of ``tools/ptq.py`` in README and docs, with a config that is there."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    runs = [run for text in texts for run in re.findall(r"python tools/ptq.py (mm_configs/[^`#\n|]*)", text)]
    return sorted({run.replace("--dry-run", "").strip() for run in runs if "mqbench" not in run})


@pytest.mark.slow
@pytest.mark.parametrize("arguments", documented_runs())
def test_documented_runs_pass_a_dry_run(
    arguments: str, clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(clone))
    words = shlex.split(arguments)
    options = ["--dry-run"] if "--work-dir" in words else ["--dry-run", "--work-dir", str(tmp_path)]
    assert "audit passed" in run("tools/ptq.py", *words[:1], *options, *words[1:], cwd=clone)


def test_documented_runs_are_found() -> None:
    assert len(documented_runs()) >= 4 and any("_tuned" in run for run in documented_runs())


def test_every_tool_is_run_by_a_test() -> None:
    """But for those that take longer, or need what no test has: named here."""
    elsewhere = {"ptq.py", "export.py", "make_hls.py", "compare.py"}  # the documented way, above
    without = {
        "bench_units.py": "SAM-B at 1,024 pixels, ten minutes",
        "convert_hdetr.py": "needs a published checkpoint",
        "demo_hw.py": "synthesis, tens of minutes",
    }
    assert {*SMALL, *OF_A_RUN, *elsewhere, "convert_yolox.py", *without} == set(TOOLS)
