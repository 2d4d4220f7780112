# SPDX-License-Identifier: Apache-2.0
"""Further configs: keys that MMEngine and MMDetection read, options of the command line, encodings of the file."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.robustness.case import DEMO, Case, config_with
from tests.robustness.kinds import Payload
from tests.robustness.materials import Materials, config_text
from tests.robustness.zygote import ROOT

_VIDEO_DEMO = str(ROOT / "mm_configs" / "demo_sam2_tiny_w4a4.py")
#: Keys -> values that they cannot have; as a config spells them.
_VALUES = {
    "custom_imports": ("5", "'x'", "dict(imports=['no.such.module'])", "dict(imports=5)"),
    "default_scope": ("5", "'no such'"),
    "log_level": ("'LOUD'", "None"),
    "visualizer": ("5", "dict(type='NoSuch')"),
    "default_hooks": ("5", "dict(logger=dict(type='NoSuch'))"),
    "custom_hooks": ("5", "[5]", "[dict(type='NoSuch')]"),
    "env_cfg": ("5", "dict(mp_cfg=5)"),
    "load_from": ("5", "['x']", "dict(a=1)", "'/nowhere.pth'", "'https://nowhere.invalid/x.pth'", "True"),
    "resume": ("True", "'x'"),
    "trust_checkpoint": ("'no'", "1", "[]"),
    "data_source": ("5", "['x']"),
    "work_dir": ("5", "['x']"),
    "randomness": ("5", "dict(seed='x')", "dict(no_such=1)"),
    "log_processor": ("5", "dict(no_such=1)"),
    "param_scheduler": ("5",),
    "model": ("dict(type='SAM')", "dict(type=5)", "dict(type='NoDetector', no_such=1)", "[]"),
    "test_evaluator": ("5", "'x'", "dict(type='NoSuch')", "[5]", "dict(type=5)"),
    "test_dataloader": (
        "dict(batch_size=0)",
        "dict(batch_size=-1)",
        "dict(batch_size='x')",
        "dict(num_workers=-1)",
        "dict(num_workers='x')",
        "dict(sampler=5)",
        "dict(sampler=dict(type='NoSuch'))",
        "dict(no_such=1)",
        "dict(dataset=5)",
        "dict(dataset=None)",
        "dict(dataset=dict(type=5))",
        "dict(dataset=dict(pipeline=5))",
        "dict(dataset=dict(pipeline=[5]))",
        "dict(dataset=dict(pipeline=[dict(type='NoSuch')]))",
        "dict(dataset=dict(count=0))",
        "dict(dataset=dict(count='x'))",
        "dict(dataset=dict(_delete_=True, type='CocoDataset'))",
        "dict(dataset=dict(_delete_=True, type='CocoDataset', ann_file='nowhere.json'))",
        "dict(dataset=dict(_delete_=True, type='CocoDataset', ann_file=5, data_root='.'))",
        "dict(dataset=dict(_delete_=True, type='CocoDataset', ann_file='x', data_root=5))",
        "dict(dataset=dict(_delete_=True, type='CocoDataset', ann_file='x', data_prefix=5))",
        "dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=5))",
        "dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=[]))",
        *(
            f"dict({key}={value})"
            for key in ("persistent_workers", "pin_memory", "drop_last")
            for value in ("'x'", "1")
        ),
        *(
            f"dict({key}={value})"
            for key in ("collate_fn", "batch_sampler", "worker_init_fn")
            for value in ("5", "'x'")
        ),
        "dict(num_workers=100000)",
        "dict(sampler=dict(type='InfiniteSampler'))",
        "dict(sampler=dict(type='DefaultSampler', shuffle='x'))",
        "dict(prefetch_factor=3)",
    ),
    "test_cfg": (
        "dict(cache_dir=5)",
        "dict(cache_dir=['x'])",
        "dict(units=5)",
        "dict(units=[])",
        "dict(units=[5])",
        "dict(leave='x')",
        "dict(leave=[5])",
        "dict(max_boxes=0)",
        "dict(box_chunk=0)",
        "dict(score_thr=-0.1)",
        "dict(score_thr=1.5)",
        "dict(calib=dict(num_images=0))",
        "dict(calib=dict(num_images=10**9))",
        "dict(calib=dict(dataset=5))",
        "dict(calib=dict(dataset=dict(type='NoSuch')))",
        "dict(calib=dict(prompts='no such'))",
        "dict(calib=dict(prompts=5))",
        "dict(calib=dict(prompts={'boxes': -1}))",
        "dict(calib=dict(prompts={'boxes': 'x'}))",
        "dict(calib=dict(prompts={'no such': 1}))",
        "dict(calib=dict(prompts={}))",
        "dict(everything=dict(num_images=0))",
        "dict(everything=dict(points_per_side=0))",
        "dict(everything=dict(points_per_side='x'))",
        "dict(everything=dict(points_per_side=10**6))",
        "dict(everything=dict(pred_iou_thresh=float('nan')))",
        "dict(calib=dict(tune_images=10**9)); recipe = dict(tune_steps=1)",
        "dict(calib=dict(tune_images=1, prompts=dict(box=0.5, mask=0.5)))",
        "dict(calib=dict(tune_batches=2))",
        "dict(calib=dict(max_boxes=10**30))",
        "dict(eval_prompts=['box'])",
        "dict(eval_prompts='mask')",
        "dict(device='cpu:1')",
        "dict(device=0)",
        "dict(toolkit='MQBENCH')",
        "dict(everything=dict(no_such=1))",
        "dict(toolkit=5)",
        "dict(type=5)",
        "dict(recipe=dict(name='rtn'))",
    ),
    "recipe": (
        "dict(families=dict(softmax='no such'))",
        "dict(families=dict(no_such='uniform'))",
        "dict(families={5: 'uniform'})",
        "dict(families=dict(softmax=5))",
        "dict(families=dict(softmax=['lnq']))",
        "dict(without=dict(no_such=['*']))",
        "dict(without=dict(lnq='*'))",
        "dict(without=dict(lnq=5))",
        "dict(without=dict(lnq=[5]))",
        "dict(without=dict(lnq=None))",
        "dict(name='ahcq', agq=True)",
        "dict(refit=0.1)",
        "dict(exponent_start=2.0, exponent_end=3.0)",
        "dict(cag_groups=60000)",
        "dict(iterations=10**9)",
        "dict(w_bits=2**40)",
        "dict(seed=2**64)",
        "dict(seed=-1)",
        "dict(warmup=1.5)",
        "dict(keep_probability=-0.1)",
        "dict(batch_size=10**9)",
        "dict(cache_device='cuda')",
        "dict(cache_device='gpu')",
    ),
    "sam": (
        "dict(name='sam_tiny', checkpoint='nowhere.pth')",
        "dict(name='sam_tiny', checkpoint=5)",
        "dict(name='sam_tiny', checkpoint=True)",
        "dict(name='sam_tiny', checkpoint='.')",
        "dict(name='vit_b')",
        "dict(name=5)",
        "dict(name=None)",
        "dict(name=['sam_tiny'])",
        "dict(name='sam2_tiny')",
        "dict(name='hf:/nowhere')",
        "dict(name='hf:')",
        "dict(name={})",
        "dict(name=dict(image_size=64))",
        "dict(name='')",
    ),
}
#: Keys of a data set of MMDetection -> values that they cannot have.
_OF_DATA_SETS = {
    "data_prefix": ("'images/'", "5", "dict(img=5)", "dict(img=None)", "dict(img='nowhere/')"),
    "metainfo": (
        *("5", "[]", "dict(classes='object')", "dict(classes=[])", "dict(classes=5)", "dict(classes=(5,))"),
        *("dict(classes=('object', 'object'))", "dict(clases=('object',))"),
    ),
    "ann_file": ("''", "'.'", "'/dev/null'", "None", "['x']"),
    "data_root": ("5", "'/'", "['x']"),
    "filter_cfg": ("5", "'x'"),
    "backend_args": ("5", "dict(backend='no')"),
    "indices": ("-1", "0", "'x'", "[99]", "[]", "[1.5]"),
    "max_refetch": ("-1", "'x'"),
    "proposal_file": ("5", "'nowhere.pkl'"),
    **dict.fromkeys(("serialize_data", "test_mode", "lazy_init", "return_classes"), ("'x'", "1", "None")),
}
#: What only a run that loads the data can see; a dry run draws its own.
_IN_A_RUN = (
    "prompts='no such'",
    "load_from",
    "checkpoint=",
    "ann_file",
    "count=",
    "num_images=10**9",
    "tune_images=10**9",
    "vit_b",
    "hf:",
    "cag_groups=60000",
)
_OPTIONS = (
    ["recipe"],
    ["=5"],
    ["recipe.w_bits=99"],
    ["recipe.w_bits=four"],
    ["recipe=5"],
    ["recipe.no_such=5"],
    ["recipe.name=no_such"],
    ["recipe.name.x=1"],
    ["recipe.families.softmax=no_such"],
    ["recipe.families=uniform"],
    ["test_cfg=5"],
    ["test_cfg.no_such=1"],
    ["test_cfg.calib.no_such=1"],
    ["test_cfg.calib=x"],
    ["test_cfg.units=no.such"],
    ["model.type=NoSuch"],
    ["sam.name=vit_z"],
    ["sam=x"],
    ["test_dataloader.dataset.no_such=1"],
    ["test_dataloader.dataset.type=NoSuch"],
    ["recipe.w_bits="],
    ["recipe.w_bits=(4"],
    ["recipe.w_bits=[4,4]"],
    ["test_cfg.resume=maybe"],
    ["recipe..w_bits=4"],
    [".w_bits=4"],
    ["no_such_section.key=1"],
)
_FLAGS = (
    ["--no-such-flag"],
    ["--recipe", "no such"],
    ["--recipe", ""],
    ["--w-bits", "1"],
    ["--a-bits", "9"],
    ["--seed", "-1"],
    ["--seed", "99999999999999999999"],
    ["--launcher", "no such"],
    ["--launcher", "pytorch"],
    ["--launcher", "slurm"],
    ["--launcher", "mpi"],
    ["another.py"],
    ["--work-dir", ""],
    ["--work-dir", "a\nb\tc" * 80],
    ["--work-dir", "/dev/null"],
    ["--work-dir", "/proc/run"],
    ["--device", "cuda"],
    ["--device", "CPU"],
    ["--device", "cpu:x"],
)


def further_configs(good: Materials) -> Iterator[Case]:
    """Values, options and encodings."""
    for key, values in _VALUES.items():
        for value in values:
            text = f"{key} = {value}"
            options = () if any(mark in text for mark in _IN_A_RUN) else ("--dry-run",)
            yield Case("config", text, "ptq.py", config_with(text, options))
    for key, values in _OF_DATA_SETS.items():
        for value in values:

            def of_data(folder: Path, text: str = f'test_dataloader["dataset"].update({key}={value})') -> list[str]:
                (folder / "config.py").write_text(f"{config_text(good.coco)}\n{text}\n")
                return [str(folder / "config.py"), "--work-dir", "run"]

            yield Case("config", f"data set, {key}={value}", "ptq.py", of_data)
    for key, values in {
        "test_cfg": ("dict(units=5)", "dict(max_frames=0)", "dict(calib=dict(no_such=1))", "dict(cache_dir=5)"),
        "data": ("dict(_delete_=True, type='VideoFolder', data_root='.', layout='davis')",),
        "test_dataloader": (
            "dict(dataset=dict(count=0))",
            "dict(dataset=dict(frames=0))",
            "dict(dataset=dict(size=0))",
        ),
    }.items():
        for value in values:
            text = f"{key} = {value}" if key != "data" else f"data = {value}\ntest_dataloader = dict(dataset=data)"
            options = () if "dataset" in text else ("--dry-run",)
            yield Case("config", f"clips, {text}", "ptq.py", config_with(text, options, base=_VIDEO_DEMO))
    for words in _OPTIONS:
        argv = [DEMO, "--dry-run", "--work-dir", "run", "--cfg-options", *words]
        yield Case("config", f"--cfg-options {words[0]}", "ptq.py", _always(argv))
    for words in _FLAGS:
        argv = [DEMO, "--dry-run", "--work-dir", "run", *words]
        yield Case("config", " ".join(words)[:60], "ptq.py", _always(argv))
    for tool in ("evaluate.py",):
        for words in _OPTIONS[:8]:
            argv = [str(good.config), str(good.quantized[0]), "--work-dir", "run", "--cfg-options", *words]
            yield Case("config", f"--cfg-options {words[0]}", tool, _always(argv))
    plain = f"_base_ = {DEMO!r}\n"
    files: dict[str, Callable[[Path], object]] = {
        "UTF-16": lambda path: path.write_bytes(plain.encode("utf-16")),
        "a NUL byte": lambda path: path.write_bytes(plain.encode() + b"x = '\0'\n"),
        "not UTF-8": lambda path: path.write_bytes(plain.encode() + b"x = '\xff\xfe'\n"),
        "tabs and spaces": lambda path: path.write_text(f"{plain}if True:\n\tx = 1\n        y = 2\n"),
        "raises KeyError": lambda path: path.write_text(f"{plain}{{}}['x']\n"),
        "raises SystemExit": lambda path: path.write_text(f"{plain}raise SystemExit\n"),
        "os._exit": lambda path: path.write_text(f"{plain}import os\nraise OSError('no')\n"),
        "imports nothing": lambda path: path.write_text(f"{plain}import no_such_module\n"),
        "recursion": lambda path: path.write_text(f"{plain}def f():\n    return f()\nf()\n"),
        "base is a number": lambda path: path.write_text("_base_ = 5\n"),
        "base is a folder": lambda path: path.write_text("_base_ = '.'\n"),
        "bases with one key twice": lambda path: path.write_text(f"_base_ = [{DEMO!r}, {DEMO!r}]\n"),
        "two bases in a circle": lambda path: (
            path.write_text("_base_ = './other.py'\n"),
            path.with_name("other.py").write_text("_base_ = './leaf.py'\n"),
        ),
        "reference to nothing": lambda path: path.write_text(f"{plain}x = {{{{_base_.no_such}}}}\n"),
        "deletes the recipe": lambda path: path.write_text(f"{plain}recipe = dict(_delete_=True)\n"),
    }
    for kind, write in files.items():

        def prepare(folder: Path, write: Callable[[Path], object] = write) -> list[str]:
            write(folder / "leaf.py")
            return [str(folder / "leaf.py"), "--dry-run", "--work-dir", str(folder / "run")]

        yield Case("config", kind, "ptq.py", prepare)
    others = {
        "JSON": ("leaf.json", "{}"),
        "JSON, a list": ("leaf.json", "[1]"),
        "JSON, a key twice": ("leaf.json", f'{{"_base_": "{DEMO}", "recipe": {{"name": "rtn", "name": "qdrop"}}}}'),
        "JSON, NaN": ("leaf.json", f'{{"_base_": "{DEMO}", "recipe": {{"scale_lr": NaN}}}}'),
        "YAML, cut off": ("leaf.yaml", "a: ["),
        "YAML, a list": ("leaf.yaml", "- 1"),
        "YAML, a key twice": ("leaf.yaml", f"_base_: {DEMO}\nrecipe: {{name: rtn, name: qdrop}}\n"),
        "YAML, an object": ("leaf.yaml", "a: !!python/object/apply:os.system ['touch payload_ran']\n"),
        "YAML, an anchor of nothing": ("leaf.yaml", "a: *b\n"),
        "YAML, wrong values": ("leaf.yml", "recipe: 5"),
        "text": ("leaf.txt", plain),
        "without a suffix": ("leaf", plain),
    }
    for kind, (name, text) in others.items():

        def another(folder: Path, name: str = name, text: str = text) -> list[str]:
            (folder / name).write_text(text)
            return [str(folder / name), "--dry-run", "--work-dir", str(folder / "run")]

        yield Case("config", f"file of {kind}", "ptq.py", another)
    for place in ("test_dataloader", "test_cfg.calib"):

        def proposals(folder: Path, place: str = place) -> list[str]:
            (folder / "proposals.pkl").write_bytes(pickle.dumps(Payload()))
            option = f"{place}.dataset.proposal_file={folder / 'proposals.pkl'}"
            return [str(good.config), "--work-dir", "run", "--cfg-options", option]

        yield Case("config", f"a payload in {place}.dataset.proposal_file", "ptq.py", proposals)


#: Benchmarks, which only developers call.
_BENCHES = {
    "bench_acnr.py": (
        ["--shapes", "x"],
        ["--shapes", "0x4"],
        ["--chunks", "0"],
        ["--timed", "x"],
        ["--json", "/dev/null/x"],
    ),
    "bench_inference.py": (["--models", "x"], ["--variants", "x"], ["--boxes", "0"], ["--repeats", "x"]),
    "bench_integer.py": (
        ["--model", "x"],
        ["--recipes", "x:4"],
        ["--recipes", "rtn:9"],
        ["--backend", "x"],
        ["--boxes", "0"],
    ),
    "bench_memory.py": (["--boxes", "0", "1"], ["--boxes", "1"], ["--device", "x"]),
    "bench_quantizers.py": (["--shape", "0", "4"], ["--bits", "9"], ["--repeat", "0"], ["--device", "meta"]),
    "bench_range_search.py": (["--shapes", "4"], ["--shapes", "axb"], ["--bits", "1"], ["--json", "/dev/null/x"]),
    "bench_units.py": (["--boxes", "-1"], ["--recipes", "x"], ["--device", "cuda:9"]),
    "bench_video.py": (["--models", "x"], ["--recipes", "x"], ["--size", "0"], ["--frames", "x"], ["--objects", "0"]),
    "hw_model.py": (["--json", "/dev/null/x"], ["--models", "x"]),
}


def benches(good: Materials) -> Iterator[Case]:
    """Options of the benchmarks."""
    for tool, calls in _BENCHES.items():
        for words in calls:
            yield Case("options", " ".join(words), tool, _always(words))


def _always(argv: list[str]) -> Callable[[Path], list[str]]:
    return lambda folder: argv
