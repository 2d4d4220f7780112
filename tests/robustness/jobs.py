# SPDX-License-Identifier: Apache-2.0
"""What is killed and whose files are damaged, at settings that take seconds."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ahcq_plugin.export import load_spec
from ahcq_plugin.ptq.packed import read_packed
from ahcq_plugin.support.digest import digest
from ahcq_plugin.support.safe_load import safe_load
from ahcq_plugin.zoo.checkpoints import default_checkpoint
from ahcq_plugin.zoo.scenes import write_coco
from tests.robustness.materials import config_text
from tests.robustness.zygote import ROOT, Ended, Zygote

_IMAGES = """
recipe.update(name="qdrop", w_bits=4, a_bits=4, iterations=3)
test_cfg["calib"].update(max_boxes=1)
test_cfg.update(
    cache_dir="cache",
    units=["image_encoder.blocks.0", "image_encoder.blocks.1", "mask_decoder.transformer.layers.0"],
)
"""
_CLIPS = """
_base_ = ["{root}/mm_configs/demo_sam2_tiny_w4a4.py"]
recipe = dict(_delete_=True, name="qdrop", w_bits=4, a_bits=4, iterations=3)
data = dict(data_root="clips", count=1, frames=4)
test_dataloader = dict(dataset=data)
test_cfg = dict(calib=dict(num_videos=1, max_objects=1, num_frames=2, dataset=data), cache_dir="cache")
"""
_LAYERS = ("image_encoder.blocks.0",)
_RESULTS = ("metrics.json", "quantized.pth", "quantized.safetensors")


@dataclass(frozen=True)
class Job:
    """A call of a tool in a folder.

    Args:
        argv: from the folder in which it runs; the same for the call that is killed and the one that goes on.
        before: makes what is in the folder before.
        result: digests of what it made, without times and paths.
        look: what a killed call left, by the same digests; only for tools that write at once.
        allowed: what it may leave beside the whole result; empty: anything, as it is gone on with.
    """

    name: str
    tool: str
    argv: Callable[[Path], list[str]]
    result: Callable[[Path], dict[str, str]]
    before: Callable[[Path], Any] = lambda folder: None
    look: Callable[[Path], dict[str, str] | None] = lambda folder: None
    allowed: list[dict[str, str] | None] = field(default_factory=lambda: [None])

    @staticmethod
    def litter(folder: Path) -> list[Path]:
        """Files and folders with temporary names."""
        return [path for path in folder.rglob(".*") if path.name.endswith((".tmp", ".new")) or ".o-" in path.name]


def untimed(value: Any) -> Any:
    """Nested plain values without those that differ from run to run: times, memory, sizes of files, paths."""
    if isinstance(value, dict):
        varying = ("seconds", "seconds_per_frame", "peak_bytes", "stages", "files", "config", "key", "sha256")
        return {key: untimed(entry) for key, entry in value.items() if key not in varying}
    return [untimed(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def quantized(work_dir: Path) -> dict[str, str]:
    """Digests of a run's results."""
    content = {
        "metrics.json": json.loads((work_dir / "metrics.json").read_text()),
        "quantized.pth": safe_load(work_dir / "quantized.pth"),
        "quantized.safetensors": read_packed(work_dir / "quantized.safetensors"),
    }
    return {name: digest(untimed(value)) for name, value in content.items()}


def readable(work_dir: Path) -> None:
    """Read whatever a killed run left. ValueError, OSError: something is not whole."""
    for path in work_dir.rglob("*.pt*"):
        if not path.name.startswith("."):
            safe_load(path)
    for path in work_dir.glob("*.safetensors"):
        read_packed(path)


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder that its maker did not hide; empty: there is no folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.relative_to(folder).name.startswith("."))
    return {path.relative_to(folder).as_posix(): digest(path.read_bytes()) for path in sorted(files)}


def exported(folder: Path) -> dict[str, str] | None:
    """Digests of a spec; None: there is none. ValueError: it cannot be loaded."""
    if not (folder / "spec.json").exists():
        return None
    load_spec(folder)
    return tree(folder)


def jobs(shared: Path, zygote: Zygote) -> Iterator[Job]:
    """All jobs, in an order in which later ones find what they read in ``shared``."""
    (shared / "clips.py").write_text(_CLIPS.format(root=ROOT))
    images = images_config(shared)
    for name, config in (("ptq", images), ("video ptq", shared / "clips.py")):
        argv = [str(config), "--work-dir", "run", "--resume"]
        yield Job(
            name,
            "ptq.py",
            lambda folder, argv=argv: argv,
            lambda folder: quantized(folder / "run"),
            look=lambda folder: readable(folder / "run"),
        )
    run = quantized_run(shared, zygote)
    yield Job(
        "export",
        "export.py",
        lambda folder: [str(run / "quantized.pth"), "-o", "spec"],
        lambda folder: tree(folder / "spec"),
        look=lambda folder: exported(folder / "spec"),
    )
    yield generating(shared, run, zygote)
    options = ["--config", str(images), "--folder", "figures", "--work-dir", "runs", "--fill", "--only", "rtn_w8a8"]

    def figures(folder: Path) -> dict[str, str]:
        (file,) = (folder / "figures").glob("*.json")
        return {file.name: digest(untimed(json.loads(file.read_text())))}

    yield Job("results", "results_table.py", lambda folder: options, figures)


def images_config(shared: Path) -> Path:
    """A config of a short run on two scenes, and the scenes."""
    write_coco(shared / "coco", 2, seed=5)
    config = shared / "images.py"
    config.write_text(config_text(shared / "coco") + _IMAGES)
    return config


def quantized_run(shared: Path, zygote: Zygote) -> Path:
    """A finished run on images, made once."""
    work_dir = shared / "finished"
    if not work_dir.exists():
        ended = zygote.run("ptq.py", [str(images_config(shared)), "--work-dir", str(work_dir)], shared, 600)
        assert ended.status == 0, ended.text
    return work_dir


def generating(shared: Path, run: Path, zygote: Zygote) -> Job:
    """C++ over C++ that was made with other options: the old folder or the new one."""

    def argv(pe: int, out: str) -> list[str]:
        return [str(shared / "spec"), "-o", out, "--layers", *_LAYERS, "--pe", str(pe)]

    for tool, arguments in (
        ("export.py", [str(run / "quantized.pth"), "-o", str(shared / "spec")]),
        ("make_hls.py", argv(4, str(shared / "older"))),
    ):
        ended = zygote.run(tool, arguments, shared, 600)
        assert ended.status == 0, ended.text

    def sources(folder: Path) -> dict[str, str]:
        return {name: value for name, value in tree(folder).items() if not name.startswith("report")}

    return Job(
        "make_hls",
        "make_hls.py",
        lambda folder: argv(8, "cpp"),
        lambda folder: sources(folder / "cpp"),
        before=lambda folder: shutil.copytree(shared / "older", folder / "cpp"),
        look=lambda folder: sources(folder / "cpp"),
        allowed=[sources(shared / "older")],
    )


@dataclass(frozen=True)
class Flipped:
    """A call that reads a file which ``prepare`` copies to where it is damaged.

    Args:
        argv: of the call.
        whole: digests of what it makes when nothing is damaged; None: it has no way to go on without the file.
    """

    name: str
    tool: str
    prepare: Callable[[Path, random.Random], Path]
    argv: Callable[[Path], list[str]]
    whole: dict[str, str] | None = None

    def recomputed(self, ended: Ended, folder: Path) -> bool:
        """It went on, said so, and made what it should."""
        told = re.search(r"computed again|damaged|cannot be read", ended.text)
        return self.whole is not None and told is not None and quantized(folder / "run") == self.whole


def flipped_files(shared: Path, zygote: Zygote) -> list[Flipped]:
    """Readers of files of a run, of its results and of weights."""
    run = quantized_run(shared, zygote)
    config = str(shared / "images.py")
    whole = quantized(run)

    def copied(source: Path) -> Callable[[Path, random.Random], Path]:
        return lambda folder, chance: Path(shutil.copy(source, folder))

    def halfway(folder: Path, chance: random.Random) -> Path:
        """A run as if killed before its results, one of whose finished units is to be damaged."""
        shutil.copytree(run, folder / "run")
        shutil.copytree(shared / "cache", folder / "cache")
        for name in _RESULTS:
            (folder / "run" / name).unlink()
        return chance.choice(sorted((folder / "run" / "units").glob("*.pt")))

    def cached(folder: Path, chance: random.Random) -> Path:
        halfway(folder, chance)
        return chance.choice(sorted((folder / "cache").glob("*.json")))

    resume = [config, "--work-dir", "run", "--resume"]
    weights = default_checkpoint("sam_tiny")
    checkpoint = [config, "--work-dir", "run", "--cfg-options", f"sam.checkpoint={weights.name}"]
    return [
        Flipped("resume: a finished unit", "ptq.py", halfway, lambda folder: resume, whole),
        Flipped("export: quantized.pth", "export.py", copied(run / _RESULTS[1]), lambda f: [_RESULTS[1], "-o", "spec"]),
        Flipped("sam.checkpoint", "ptq.py", copied(weights), lambda folder: checkpoint),
        Flipped("resume: what is cached", "ptq.py", cached, lambda folder: resume, whole),
        Flipped(
            "export: quantized.safetensors",
            "export.py",
            copied(run / _RESULTS[2]),
            lambda f: [_RESULTS[2], "-o", "spec"],
        ),
    ]
