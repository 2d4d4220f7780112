# SPDX-License-Identifier: Apache-2.0
"""Checks of what a config names, before the hours: data sets, the detector's checkpoint."""

from __future__ import annotations

import inspect
import os.path
from collections.abc import Mapping
from typing import Any

from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config

from ahcq_plugin.mm.data.settings import check_data_set
from ahcq_plugin.mm.data.wrappers import innermost, wrapped
from ahcq_plugin.mm.detectors.loading import read_detector
from ahcq_plugin.support.batches import blaming
from ahcq_plugin.zoo.coco import check_coco, read_content, read_detections
from ahcq_plugin.zoo.published import of_path

DRY_RUN = "--dry-run runs without it"


def check_dataset(config: Mapping[str, Any], source: str | None = None, masks: bool = False) -> None:
    """Annotation file and images of a data set are there and not empty; with ``masks``, every object has a mask.

    Args:
        config: of a data set, or of wrappers around some.
        source: where the data are to be had, for the message.

    Raises:
        FileNotFoundError, ValueError: something is missing; what is there cannot be used.
    """
    parts = wrapped(config)
    for part in parts:
        check_dataset(part, source, masks)
    if parts or not config.get("ann_file"):
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
        check_coco(ann_file, folder, masks)


def check_known(config: Mapping[str, Any], where: str) -> None:
    """ValueError for a data set, or one inside it, of a type or with keys that nobody knows; a dry run builds another,
    which would not say so."""
    check_data_set(config, where)
    for part in [config, *wrapped(config)]:
        kind = DATASETS.get(part["type"]) if isinstance(part["type"], str) else part["type"]
        if kind is None:
            raise ValueError(f"{where}: unknown data set {part['type']!r}: its module belongs into custom_imports")
        known = _parameters(kind)
        unknown = sorted(set(part) - known - {"type", "_scope_"}) if known else []
        if unknown:
            raise ValueError(f"{where}: {part['type']} takes no {unknown[0]!r}; it takes {', '.join(sorted(known))}")


def _parameters(kind: type) -> set[str]:
    """What the constructor of a class takes by name, also of classes that it hands ``**kwargs`` on to; empty where
    they take anything."""
    names: set[str] = set()
    for base in kind.__mro__:
        parameters = inspect.signature(base.__init__).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if all(p.kind != p.VAR_KEYWORD for p in parameters):
            return names - {"self"}
    return set()


def check_pipeline(config: Mapping[str, Any]) -> None:
    """ValueError for a data set of images without transforms, which gives no images."""
    if not innermost(config).get("pipeline"):
        raise ValueError("test_dataloader.dataset has no `pipeline`: give the transforms that load and pack images")


def check_detections(path: str, config: Mapping[str, Any]) -> None:
    """A file of detections has some for the images and categories of a data set, as far as its annotations say.

    Raises: FileNotFoundError, ValueError: one line.
    """
    rows, inner = read_detections(path), innermost(config)
    if not rows:
        raise ValueError(f"{path} holds no detections")
    ann_file = os.path.join(inner.get("data_root") or "", inner.get("ann_file") or "")
    if not ann_file.endswith(".json"):
        return
    content = read_content(ann_file)
    for key, part in (("image_id", "images"), ("category_id", "categories")):
        ids = {row["id"] for row in content[part]}
        if not any(row[key] in ids for row in rows):
            raise ValueError(f"{path} has no detection whose {key} is among the {part} of {ann_file}")


def check_detector(cfg: Config) -> None:
    """``load_from`` is there, readable and fits: the Runner would load what fits and keep silent about the rest.

    Raises:
        FileNotFoundError, ValueError: no such file, and who fetches it; not a checkpoint, or of another detector.
    """
    path = cfg.get("load_from")
    if not path:
        raise ValueError(f"`load_from` is not set: the detector would have random weights; {DRY_RUN}")
    if "://" not in path and not os.path.isfile(path):
        raise FileNotFoundError(f"no detector checkpoint {path}{_where_to_get(path)}; {DRY_RUN}")
    state = read_detector(cfg)
    with blaming("the config's `model` does not build"):
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


def _where_to_get(path: str) -> str:
    """For a message: who fetches a published file, '' for others."""
    entry = of_path(path)
    return f": python tools/fetch_weights.py {entry.name} makes it of {entry.url}" if entry else ""
