# SPDX-License-Identifier: Apache-2.0
"""Kind by place for the other tools: every number, device, folder and file on a command line; runs on videos."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from tests.robustness import kinds
from tests.robustness.case import Case, config_with
from tests.robustness.materials import Materials
from tests.robustness.zygote import ROOT

VIDEO_DEMO = str(ROOT / "mm_configs" / "demo_sam2_tiny_w4a4.py")
#: Numbers that must be above 0, by tool; those of ``_FROM_ZERO`` may be 0, those of ``_REAL`` need not be whole.
_NUMBERS = {
    "compare_cag_clustering.py": ("--bits", "--groups", "--images"),
    "compare_golden.py": ("--images",),
    "demo_hls.py": ("--images",),
    "demo_hw.py": ("--cells",),
    "eval_sam2_tiny.py": ("--clips", "--every"),
    "export_bundle.py": ("--images", "--runs"),
    "hw_model.py": ("--boxes", "--cells", "--bits", "--bandwidth"),
    "plot_distributions.py": ("--images", "--boxes", "--bits"),
    "prompt_errors.py": ("--bits", "--images", "--objects"),
    "ptq.py": ("--w-bits", "--a-bits", "--seed"),
    "role_sensitivity.py": ("--bits", "--calibration", "--images", "--boxes"),
    "sam_tiny_stats.py": ("--images",),
    "time_image.py": ("--boxes", "--repeats", "--threads"),
    "train_sam2_tiny.py": ("--workers", "--threads", "--steps", "--batch", "--lr"),
    "train_sam_tiny.py": ("--processes", "--workers", "--steps", "--batch", "--lr"),
}
_FROM_ZERO, _REAL = ("--seed", "--workers"), ("--bandwidth", "--lr")
_DEVICES = ("compare", "eval_sam2_tiny", "eval_sam_tiny", "evaluate", "plot_distributions", "prompt_errors", "ptq")
_DEVICES += ("role_sensitivity", "sam_tiny_stats", "train_sam2_tiny", "train_sam_tiny")
_COCO = ("compare_cag_clustering", "compare_golden", "eval_sam_tiny", "export_bundle", "plot_distributions")
_COCO += ("prompt_errors", "role_sensitivity", "sam_tiny_stats", "train_sam2_tiny", "train_sam_tiny")
_WEIGHTS = ("eval_sam2_tiny", "eval_sam_tiny", "plot_distributions", "prompt_errors", "role_sensitivity")
_WEIGHTS += ("sam_tiny_stats",)

#: Options that do not go together, or are no use without another.
_COMBINATIONS = (
    ("compare.py", ["--annotations", "x.json"]),
    ("compare.py", ["--box", "1,2,3,4,5"]),
    ("compare.py", ["--box", "0,0,inf,5"]),
    ("compare.py", ["--sam-checkpoint", "nowhere.pth"]),
    ("compare_cag_clustering.py", ["--images", "1"]),
    ("compare_cag_clustering.py", ["--images", "3", "--bits", "4", "--groups", "100000000"]),
    ("compare_golden.py", ["--coco", "nowhere"]),
    ("fetch_weights.py", ["--list", "--check"]),
    ("hw_model.py", ["--models", "vit_b", "--cells", "2", "--bandwidth", "1e-300"]),
    ("demo_hls.py", ["another.pth"]),
    ("eval_sam2_tiny.py", ["--davis", "nowhere"]),
    ("evaluate.py", ["--integer", "--device", "cuda"]),
    ("evaluate.py", ["another.pth"]),
    ("export_bundle.py", ["--style", "exact", "--int4"]),
    ("ptq.py", ["--resume", "--seed", "x"]),
    ("time_image.py", ["--threads", "100000"]),
    ("time_image.py", ["--boxes", "1000000000"]),
    ("train_sam_tiny.py", ["--coco", "nowhere"]),
    ("train_sam_tiny.py", ["--processes", "1000000"]),
    ("train_sam_tiny.py", ["--lr", "1e300"]),
)


def call(tool: str, good: Materials) -> list[str]:
    """Arguments with which a tool would run, but for those that a case adds."""
    quantized = str(good.quantized[0])
    return {
        "compare.py": [str(good.image()), quantized, "--box", "9,9,50,50"],
        "compare_golden.py": [quantized, str(good.spec)],
        "demo_hls.py": [quantized, "-o", "out"],
        "demo_hw.py": [quantized, "-o", "out"],
        "eval_sam2_tiny.py": ["--work-dir", "clips"],
        "eval_sam_tiny.py": ["--out", "out"],
        "evaluate.py": [str(good.config), quantized, "--work-dir", "run"],
        "export_bundle.py": [quantized, "-o", "out"],
        "plot_distributions.py": ["--out", "out"],
        "prompt_errors.py": ["--calibrate", str(good.coco), "--coco", str(good.coco)],
        "ptq.py": [str(good.config), "--work-dir", "run"],
        "sam_tiny_stats.py": ["--out", "out"],
        "time_image.py": [quantized],
        "train_sam2_tiny.py": ["--scenes-only", "--out", "out"],
        "train_sam_tiny.py": ["--scenes-only", "--out", "out"],
    }.get(tool, [])


def _always(argv: list[str]) -> Callable[[Path], list[str]]:
    return lambda folder: argv


def options(good: Materials) -> Iterator[Case]:
    """Numbers and devices on command lines."""
    for tool, names in _NUMBERS.items():
        for name in names:
            values = [*kinds.numbers(float if name in _REAL else int), *(() if name in _FROM_ZERO else ("0",))]
            if name in ("--bits", "--w-bits", "--a-bits"):
                values += ["33", "1000000"]
            for value in values:
                yield Case("options", f"{name}={value}", tool, _always([*call(tool, good), f"{name}={value}"]))
    for tool in _DEVICES:
        for value in ("cuda:99", "meta", "gpu", ""):
            argv = [*call(f"{tool}.py", good), f"--device={value}"]
            yield Case("options", f"--device={value}", f"{tool}.py", _always(argv))
    for tool in ("plot_distributions", "prompt_errors", "role_sensitivity", "sam_tiny_stats", "hw_model"):
        key = "--models" if tool == "hw_model" else "--model"
        yield Case("options", "unknown model", f"{tool}.py", _always([*call(f"{tool}.py", good), key, "vit_z"]))
    for tool, argv in {
        "results_table.py": ["--only", "no_such"],
        "challenges.py": ["--method", "no such"],
        "fetch_weights.py": ["no_such"],
        "export.py": [str(good.quantized[0]), "-o", "out", "--sam", "vit_z"],
        "make_hls.py": [str(good.spec), "-o", "out", "--part", ""],
    }.items():
        yield Case("options", f"{' '.join(argv[-2:])}", tool, _always(argv))
    for tool, words in _COMBINATIONS:
        yield Case("options", " ".join(words), tool, _always([*call(tool, good), *words]))
    for tool, argv in (("compare.py", call("compare.py", good)), ("convert_yolox.py", ["x.onnx"])):

        def over(folder: Path, tool: str = tool, argv: list[str] = argv) -> list[str]:
            shutil.copy(argv[0], folder) if tool == "compare.py" else (folder / argv[0]).write_bytes(b"x")
            name = Path(argv[0]).name
            return [name, *argv[1:], *(["--out", name] if tool == "compare.py" else [name])]

        yield Case("options", "what it writes is what it reads", tool, over)
    for where in ("mine", ".", "spec"):

        def mine(folder: Path, where: str = where) -> list[str]:
            shutil.copytree(good.spec, folder / "spec")
            (folder / where).mkdir(exist_ok=True)
            (folder / where / "thesis.txt").write_text("years of work")
            return ["spec", "-o", where, "--layers", "image_encoder.blocks.0.attn_qkv"]

        yield Case("folders", f"-o {where}, which holds other files", "make_hls.py", mine)


def folders(good: Materials) -> Iterator[Case]:
    """Folders of data that are none, files of weights that are none, places that cannot be written."""
    for tool in _COCO:
        for kind, make in {
            "missing": lambda path: None,
            "file": lambda path: path.write_text(""),
            "empty": lambda path: path.mkdir(),
        }.items():

            def prepare(folder: Path, tool: str = f"{tool}.py", make: Callable[[Path], object] = make) -> list[str]:
                make(folder / "data")
                argv = [word for word in call(tool, good) if word not in ("--scenes-only",)]
                return [*argv, "--coco", str(folder / "data")]

            yield Case("folders", f"--coco {kind}", f"{tool}.py", prepare)
    for tool in _WEIGHTS:
        for kind, damage in (kinds.FILES | kinds.PICKLES).items():

            def given(folder: Path, tool: str = f"{tool}.py", damage: Callable[[Path], None] = damage) -> list[str]:
                more = ["--model", "sam_tiny"] if tool == "eval_sam_tiny.py" else []
                return [*call(tool, good), *more, "--weights", str(kinds.damaged(good.weights, folder, damage))]

            yield Case("folders", f"--weights {kind}", f"{tool}.py", given)
    for tool, option in {
        "export.py": "-o",
        "make_hls.py": "-o",
        "export_bundle.py": "-o",
        "demo_hls.py": "-o",
        "demo_hw.py": "-o",
        "evaluate.py": "--work-dir",
        "compare.py": "--out",
        "coverage_table.py": "--out",
        "eval_sam_tiny.py": "--out",
        "plot_distributions.py": "--out",
        "sam_tiny_stats.py": "--out",
        "train_sam_tiny.py": "--out",
        "train_sam2_tiny.py": "--out",
    }.items():
        argv = {"export.py": [str(good.quantized[0])], "make_hls.py": [str(good.spec)]}.get(tool, call(tool, good))
        for kind, where in {"under a file": "taken/out", "too long": "x" * 300}.items():

            def barred(folder: Path, argv: tuple[str, ...] = (*argv, option, where)) -> list[str]:
                (folder / "taken").write_text("")
                return list(argv)

            yield Case("folders", f"{option} {kind}", tool, barred)
    for tool in ("convert_yolox.py", "convert_hdetr.py"):
        for kind, damage in (kinds.FILES | kinds.PICKLES).items():

            def converted(folder: Path, damage: Callable[[Path], None] = damage) -> list[str]:
                return [str(kinds.damaged(good.weights, folder, damage)), "out.pth"]

            yield Case("folders", f"to convert: {kind}", tool, converted)
    for tool in ("results_table.py",):
        for kind, text in {
            "empty": "",
            "text": "x",
            "list": "[]",
            "no key": "{}",
            "no metrics": '{"key": "x"}',
        }.items():

            def figures(folder: Path, text: str = text) -> list[str]:
                (folder / "figures").mkdir()
                (folder / "figures" / "rtn_w8a8.json").write_text(text)
                return ["--config", str(good.config), "--folder", "figures", "--table", "recipes"]

            yield Case("folders", f"figures: {kind}", tool, figures)


def videos(good: Materials) -> Iterator[Case]:
    """Settings of a run on clips, and files of clips."""
    yield Case("video", "good", "ptq.py", config_with("", base=VIDEO_DEMO), control=True)
    for key in ("num_videos", "num_frames", "max_objects", "seed"):
        for value in (*kinds.VALUES[int], *(() if key == "seed" else ("0",))):
            text = f"test_cfg = dict(calib=dict({key}={value}))"
            yield Case("video", f"calib.{key}={value}", "ptq.py", config_with(text, base=VIDEO_DEMO))
    texts = [f"test_cfg = dict({key}={value})" for key in ("calib", "units", "leave") for value in ("5", "'x'", "[3]")]
    texts += [f"test_cfg = dict(resume={value})" for value in kinds.VALUES[bool]]
    texts += [f"sam = {value}" for value in ("5", "dict(name='sam2_z')", "dict(no_such=1)", "dict(name='vit_b')")]
    texts += [f"test_evaluator = {value}" for value in ("5", "[]", "dict(type='NoSuch')")]
    texts += ["test_cfg = dict(score_thr=0.5)", "test_dataloader = dict(dataset=dict(type='NoSuchSet'))"]
    for text in texts:
        yield Case("video", text, "ptq.py", config_with(text, base=VIDEO_DEMO))
    damages = dict(kinds.FILES)
    damages.pop("all but its end")

    def clip(folder: Path) -> Path:
        for t in range(4):
            for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
                path = folder / "davis" / kind / "480p" / "clip" / f"{t:05d}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                image = Image.new("L", (64, 48), 0)
                image.paste(1 if suffix == "png" else 99, (8, 8, 40, 40))
                image.save(path)
        return folder / "davis"

    def run(davis: Path) -> list[str]:
        text = f"""data = dict(_delete_=True, type="VideoFolder", data_root="{davis}", layout="davis")
recipe = dict(_delete_=True, name="rtn", w_bits=8, a_bits=8)
test_dataloader = dict(dataset=data)
test_cfg = dict(calib=dict(dataset=data, num_videos=1, num_frames=2), cache_dir=None)"""
        return config_with(text, (), base=VIDEO_DEMO)(davis.parent)

    yield Case("video", "good clip", "ptq.py", lambda folder: run(clip(folder)), control=True)
    for where in (
        "JPEGImages/480p/clip/00000.jpg",
        "Annotations/480p/clip/00000.png",
        "JPEGImages/480p/clip/00002.jpg",
    ):
        for kind, damage in damages.items():

            def damaged(folder: Path, where: str = where, damage: Callable[[Path], None] = damage) -> list[str]:
                davis = clip(folder)
                damage(davis / where)
                return run(davis)

            yield Case("video", f"{where} {kind}", "ptq.py", damaged)
    changes: dict[str, Callable[[Path], object]] = {
        "no annotations": lambda davis: shutil.rmtree(davis / "Annotations"),
        "no frames": lambda davis: shutil.rmtree(davis / "JPEGImages"),
        "nothing": lambda davis: shutil.rmtree(davis),
        "one frame": lambda davis: [p.unlink() for p in davis.rglob("*.*") if "00000" not in p.name and p.is_file()],
        "two frames": lambda davis: [p.unlink() for p in davis.rglob("0000[23].*")],
        "no object": lambda davis: Image.new("L", (64, 48)).save(davis / "Annotations/480p/clip/00000.png"),
        "mask of another size": lambda davis: Image.new("L", (9, 9), 1).save(davis / "Annotations/480p/clip/00000.png"),
        "frame of another size": lambda davis: Image.new("RGB", (9, 9)).save(davis / "JPEGImages/480p/clip/00002.jpg"),
    }
    for kind, change in changes.items():

        def changed(folder: Path, change: Callable[[Path], object] = change) -> list[str]:
            davis = clip(folder)
            change(davis)
            return run(davis)

        yield Case("video", kind, "ptq.py", changed)
