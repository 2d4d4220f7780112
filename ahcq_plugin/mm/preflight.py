# SPDX-License-Identifier: Apache-2.0
"""Everything that can be wrong with a run and be known in seconds, before the hours: one line each."""

from __future__ import annotations

import difflib
import inspect
import json
import os.path
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.runner import CheckpointLoader

from ahcq_plugin.mm.box_prompted_sam import build_sam_from_config
from ahcq_plugin.mm.data.prompts import read_detections
from ahcq_plugin.mm.ptq_loop import Calibration, PTQLoop
from ahcq_plugin.mm.toolkits import unit_preparer
from ahcq_plugin.mm.video_loop import VideoCalibration, VideoPTQLoop
from ahcq_plugin.ptq import Recipe
from ahcq_plugin.zoo.sam2 import build_sam2

DRY_RUN = "--dry-run runs without it"
#: Top-level keys that are read; a name close to one of them is taken for a typing error.
KNOWN_KEYS = ("recipe", "test_cfg", "test_dataloader", "load_from")
LOOP_TYPES = {"PTQLoop": PTQLoop, "VideoPTQLoop": VideoPTQLoop}
_GIVEN_BY_RUNNER = {"self", "runner", "dataloader", "evaluator"}


def preflight(cfg: Config, random_weights: bool = False) -> None:
    """Check a config for a PTQ run; with ``random_weights`` the detector needs no checkpoint.

    ``detector_source`` and ``data_source`` at the config's top level say where missing files are to be had.

    Raises:
        ValueError, FileNotFoundError: one line that says what is wrong and what to do.
    """
    check_keys(cfg)
    loop = cfg.test_cfg
    Recipe.from_config(cfg.recipe)
    unit_preparer(loop.get("toolkit", "native"))
    check_device(loop.get("device"))
    if loop.type == "VideoPTQLoop":
        _check_videos(cfg)
    else:
        _check_images(cfg, random_weights)


def _check_videos(cfg: Config) -> None:
    calib = VideoCalibration.from_config(cfg.test_cfg.get("calib"))
    if calib.dataset is None:
        raise ValueError("no calibration videos: give test_cfg.calib.dataset in the config")
    for config in (cfg.test_dataloader.dataset, calib.dataset):
        try:
            DATASETS.build(dict(config))
        except FileNotFoundError as error:
            where = f": {cfg.data_source}" if "data_source" in cfg else ""
            raise FileNotFoundError(f"{error}{where}; {DRY_RUN}") from error
    build_sam_from_config(cfg.sam, build_sam2)


def _check_images(cfg: Config, random_weights: bool) -> None:
    loop = cfg.test_cfg
    calib = Calibration.from_config(loop.get("calib"))
    prompts = loop.get("prompts", "detector")
    check_dataset(cfg.test_dataloader.dataset, cfg.get("data_source"), masks=True)
    calib_dataset = calib.dataset or cfg.get("train_dataloader", {}).get("dataset")
    if calib_dataset is None:
        raise ValueError("no calibration images: give test_cfg.calib.dataset or train_dataloader in the config")
    check_dataset(calib_dataset, cfg.get("data_source"))
    if prompts == "detector":
        if cfg.model.type == "NoDetector":
            raise ValueError("prompts='detector', but the config has NoDetector: use prompts='gt' or a detections JSON")
        if not random_weights:
            check_detector(cfg)
    elif prompts != "gt" and not read_detections(prompts):
        raise ValueError(f"{prompts} holds no detections")
    build_sam_from_config(cfg.sam)


def check_keys(cfg: Config) -> None:
    """Unknown or missing keys of the config, of ``test_cfg`` and of what is needed at the top level."""
    for key in cfg:
        close = difflib.get_close_matches(key, KNOWN_KEYS, n=1, cutoff=0.8)
        if close and key not in KNOWN_KEYS:
            raise ValueError(f"unknown config key {key!r}: did you mean {close[0]!r}?")
    kind = LOOP_TYPES.get((cfg.get("test_cfg") or {}).get("type"))
    if kind is None:
        raise ValueError(
            "not a PTQ config: it needs custom_imports = dict(imports=['ahcq_plugin.mm']) "
            f"and test_cfg = dict(type={' or '.join(map(repr, LOOP_TYPES))}, ...)"
        )
    allowed = [name for name in inspect.signature(kind).parameters if name not in _GIVEN_BY_RUNNER]
    unknown = sorted(set(cfg.test_cfg) - {"type", "_scope_"} - set(allowed))
    if unknown:
        raise ValueError(f"test_cfg: unknown key {', '.join(map(repr, unknown))}; allowed: {', '.join(allowed)}")
    for key in ("recipe", "sam", "model", "test_dataloader"):
        if cfg.get(key) is None:
            raise ValueError(f"the config has no `{key}`")


def check_device(name: str | None) -> None:
    """A device name that torch knows and this machine has."""
    if name is None:
        return
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: give cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: this machine has {torch.cuda.device_count()} CUDA devices")


def check_dataset(config: Mapping[str, Any], source: str | None = None, masks: bool = False) -> None:
    """Annotation file and images of a data set are there and not empty; with ``masks``, every object has a mask."""
    while "dataset" in config:
        config = config["dataset"]
    for part in config.get("datasets", ()):
        check_dataset(part, source, masks)
    if not config.get("ann_file"):
        return  # made from other data sets, or drawn by itself
    where = f": {source}" if source else ""
    root = config.get("data_root") or ""
    ann_file = os.path.join(root, config["ann_file"])
    folder = os.path.join(root, config.get("data_prefix", {}).get("img", ""))
    if not os.path.isfile(ann_file):
        raise FileNotFoundError(f"no annotation file {ann_file}{where}; {DRY_RUN}")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no image folder {folder}{where}; {DRY_RUN}")
    if ann_file.endswith(".json"):
        _check_coco(ann_file, folder, masks)


def _check_coco(ann_file: str, folder: str, masks: bool) -> None:
    try:
        content = json.loads(Path(ann_file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{ann_file} is not JSON ({error})") from error
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
        raise ValueError(f"{ann_file} is not in COCO format: expected an object with images, annotations, categories")
    for key in ("images", "annotations"):
        if not content[key]:
            raise ValueError(f"{ann_file} has no {key}")
    image = os.path.join(folder, content["images"][0]["file_name"])
    if not os.path.isfile(image):
        raise FileNotFoundError(f"{ann_file} lists {image}, which is not there")
    bare = [row["id"] for row in content["annotations"] if not row.get("segmentation") and not row.get("iscrowd")]
    if masks and bare:
        raise ValueError(
            f"{ann_file}: {len(bare)} annotations have no segmentation (first id {bare[0]}); masks are compared"
        )


def check_detector(cfg: Config) -> None:
    """``load_from`` is there, readable and fits: the Runner would load what fits and keep silent about the rest."""
    path, source = cfg.get("load_from"), cfg.get("detector_source")
    if not path:
        raise ValueError(f"`load_from` is not set: the detector would have random weights; {DRY_RUN}")
    if "://" not in path and not os.path.isfile(path):
        raise FileNotFoundError(f"no detector checkpoint {path}{f': {source}' if source else ''}; {DRY_RUN}")
    try:
        loaded = CheckpointLoader.load_checkpoint(path, map_location="cpu", logger="silent")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read the detector checkpoint {path} ({reason}); copy or download it again") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping):
        raise ValueError(f"the detector checkpoint {path} holds no state dict")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    own = MODELS.build(cfg.model).state_dict()
    wrong = [f"{name} is missing" for name in own if name not in state and not name.endswith("num_batches_tracked")]
    wrong += [
        f"{name} has shape {tuple(state[name].shape)}, the model {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if wrong:
        raise ValueError(
            f"{path} does not fit the detector: {len(wrong)} of {len(own)} tensors differ, first: {wrong[0]}"
        )
