# SPDX-License-Identifier: Apache-2.0
"""Images of an mmdet data set with everything evaluation and calibration need, read once."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from mmdet.registry import DATASETS
from mmengine.dataset import pseudo_collate
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ahcq_plugin.mm.box_prompted_sam import BoxPromptedSAM
from ahcq_plugin.mm.data.images import original_image, read_rgb
from ahcq_plugin.mm.data.prompts import BoxPrompts, prompts_from_annotations
from ahcq_plugin.mm.data.wrappers import innermost, wrapped
from ahcq_plugin.mm.errors import DataError
from ahcq_plugin.mm.evaluation import masks
from ahcq_plugin.support.batches import blaming
from ahcq_plugin.support.cache import Cache
from ahcq_plugin.support.digest import digest
from ahcq_plugin.support.workers import ALONE, Workers
from ahcq_plugin.zoo.predict import vanishes
from ahcq_plugin.zoo.prompts import CLICKS, item_generator, with_masks


class InfoDataset(Protocol):
    """What is read of a data set of mmdet, or of a wrapper of MMEngine around some; torch's Dataset promises less."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def get_data_info(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ImageRecord:
    """One image of a data set.

    Args:
        img_id: the data set's id.
        size: (height, width) in pixels.
        img_path: the file, read when needed.
        truth: ground-truth boxes without crowds.
        instances: parsed annotations as mmdet gives them (original pixels, crowds included).
        detected: boxes of the detector or of a detections file; None when ground truth is the only prompt.
        pixels: uint8 (H, W, 3) RGB of an image that has no file.
    """

    img_id: int | str
    size: tuple[int, int]
    img_path: str | None
    truth: BoxPrompts
    instances: list[dict]
    detected: BoxPrompts | None = None
    pixels: np.ndarray | None = None

    def read(self) -> np.ndarray:
        """uint8 (H, W, 3) RGB.

        Raises:
            FileNotFoundError, DataError: the file is absent, not an image or of another size than annotated.
        """
        image = read_rgb(self.img_path) if self.pixels is None else self.pixels
        if image.shape[:2] != self.size:
            raise DataError(f"{self.img_path} has {image.shape[:2]} pixels (H, W), its annotation says {self.size}")
        return image

    def check_shape(self, side: int) -> None:
        """DataError for an image of which no row or column is left when its longer side is resized to ``side``."""
        if vanishes(self.size, side):
            raise DataError(
                f"{self.img_path} has {self.size} pixels (H, W): no row or column is left when its longer side is "
                f"resized to {side}; cut it into parts"
            )

    def identity(self) -> list:
        """What determines results on this image: pixels (by hash), annotations and prompts; plain values."""
        pixels = Path(self.img_path).read_bytes() if self.pixels is None and self.img_path else self.pixels
        detected = None if self.detected is None else self.detected.to_lists()
        return [self.img_id, self.size, digest(pixels), self.instances, detected]

    @property
    def prompts(self) -> BoxPrompts:
        """Detected boxes, or ground truth when nothing was to detect."""
        return self.truth if self.detected is None else self.detected

    def truth_masks(self) -> list[masks.RLE]:
        """Ground-truth masks in the order of ``truth``.

        Raises:
            DataError: an annotation without a mask.
        """
        kept = [i for i in self.instances if not i.get("ignore_flag", 0)]
        if any("mask" not in i for i in kept):
            raise DataError(f"image {self.img_id} has an annotation without a mask; mask IoU and AP need them all")
        return [masks.from_annotation(i["mask"], self.size) for i in kept]

    def object_masks(self) -> np.ndarray | None:
        """bool (N, H, W) of ``truth``, in its order; None: not every object has a mask."""
        kept = [i for i in self.instances if not i.get("ignore_flag", 0)]
        return masks.decode(self.truth_masks(), self.size) if all("mask" in i for i in kept) else None


def record_of(info: dict) -> ImageRecord:
    """From what an mmdet data set's ``get_data_info`` returns."""
    instances = list(info.get("instances", ()))
    size = (int(info["height"]), int(info["width"]))
    return ImageRecord(info["img_id"], size, info.get("img_path"), prompts_from_annotations(instances), instances)


def read_records(
    dataloader: DataLoader, model: BoxPromptedSAM, cache: Cache, workers: Workers = ALONE
) -> list[ImageRecord]:
    """Records of all images of a test data loader, with the model's prompts; its detector runs once per image, ever
    if ``cache`` keeps files. ``workers`` go through different images as far as the loader's sampler shares them out.

    The pipeline runs only when a detector needs its output, or to fetch images that have no file.
    """
    dataset: Any = dataloader.dataset  # an InfoDataset, of which the loader's type knows nothing
    records = [record_of(dataset.get_data_info(index)) for index in range(len(dataset))]
    for record in records:
        record.check_shape(model.sam.image_encoder.img_size)
    if model.prompts == "detector":

        def key() -> str:
            detector = [digest(model.detector.state_dict()), repr(model.detector), model.score_thr, model.max_boxes]
            settings = [getattr(model.detector, "test_cfg", None), innermost(dataset).pipeline]
            return digest([*detector, *map(repr, settings), [record.identity() for record in records]])

        rows = cache.fetch("detections", key, lambda: _gathered(_detect(dataloader, model, workers), workers))
        detected = {img_id: BoxPrompts.of(*prompts) for img_id, prompts in rows}
        records = [dataclasses.replace(record, detected=detected[record.img_id]) for record in records]
    elif model.detections is not None:
        records = [dataclasses.replace(record, detected=model.detected(record.img_id)) for record in records]
    if any(record.img_path is None for record in records):
        batches = tqdm(dataloader, desc="read images", unit="batch", disable=not workers.is_first)
        mine = [(sample.img_id, original_image(sample)) for batch in batches for sample in batch["data_samples"]]
        pixels = dict(_gathered(mine, workers))
        records = [dataclasses.replace(record, pixels=pixels[record.img_id]) for record in records]
    return records


def calibration_records(
    dataset: InfoDataset, model: BoxPromptedSAM, num_images: int, seed: int, key: str = "num_images"
) -> list[ImageRecord]:
    """``num_images`` images with at least one prompt, in an order drawn with ``seed``.

    Args:
        key: of ``calib``, which asks for so many; for the message.
    Raises:
        ValueError: not that many images have a prompt.
    """
    if num_images > len(dataset):
        raise ValueError(
            f"calib: `{key}` is {num_images}, but there are only {len(dataset)} calibration images; lower it or give "
            "more images"
        )
    chosen = []
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    with tqdm(total=num_images, desc="calibration images", unit="image") as bar:
        for index in order:
            record = record_of(dataset.get_data_info(index))
            record.check_shape(model.sam.image_encoder.img_size)
            batch = None
            if model.prompts == "detector" or record.img_path is None:
                batch = pseudo_collate([dataset[index]])
            if record.img_path is None:
                record = dataclasses.replace(record, pixels=original_image(batch["data_samples"][0]))
            if model.prompts == "detector":
                ((_, detected),) = _prompt(model, batch)
                record = dataclasses.replace(record, detected=detected)
            elif model.detections is not None:
                record = dataclasses.replace(record, detected=model.detected(record.img_id))
            if len(record.prompts):
                chosen.append(record)
                bar.update()
            if len(chosen) == num_images:
                return chosen
    if not chosen:
        raise ValueError(
            f"calib: none of {len(dataset)} calibration images has a box: are the classes of the config "
            "(metainfo) the names of the categories in the annotation file?"
        )
    raise ValueError(
        f"calib: `{key}` is {num_images}, but only {len(chosen)} of {len(dataset)} calibration images have a box; "
        "lower it or give more images"
    )


class CalibrationBatches(Sequence):
    """Calibration items for ``ahcq_plugin.quantize``, made when asked for: see ``BoxPromptedSAM.calibration_batch``.

    Images with more than ``max_boxes`` prompts get a sample that depends on ``seed`` and their position only.

    Args:
        kinds: of the prompt, for each image (see :data:`ahcq_plugin.zoo.prompts.KINDS`); default: boxes.
        workers: the first one's mask inputs are everyone's. They are made at once, by the model in floating point.
    """

    def __init__(
        self,
        model: BoxPromptedSAM,
        records: Sequence[ImageRecord],
        max_boxes: int,
        seed: int,
        kinds: Sequence[str] | None = None,
        workers: Workers = ALONE,
    ):
        self._model, self._records, self._max_boxes, self._seed = model, records, max_boxes, seed
        self.kinds = ["box"] * len(records) if kinds is None else list(kinds)
        self._mask_inputs: dict[int, Tensor] = {}
        with_mask = [index for index, kind in enumerate(self.kinds) if kind == "mask"]
        for index in tqdm(with_mask, desc="mask inputs", unit="image", disable=not (with_mask and workers.is_first)):
            self._mask_inputs[index] = with_masks(model.sam, self._drawn(index))["masks"].cpu()
        if with_mask:
            self._mask_inputs = workers.first(self._mask_inputs)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def image_ids(self) -> list[int | str]:
        """Ids of the images, in their order."""
        return [record.img_id for record in self._records]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self._drawn(index)
        return {**item, "masks": self._mask_inputs[index]} if index in self._mask_inputs else item

    def _drawn(self, index: int) -> dict[str, Tensor]:
        record, kind = self._records[index], self.kinds[index]
        return self._model.calibration_batch(
            record.read(),
            record.prompts.boxes,
            self._max_boxes,
            item_generator(self._seed, index),
            kind,
            record.object_masks() if kind in CLICKS and record.detected is None else None,
        )


def calibration_dataset(config: Mapping[str, Any], pipeline: Sequence[Mapping[str, Any]]) -> InfoDataset:
    """Data set of a training config under another pipeline: without filtering, repetition and mixing of images."""
    with (
        contextlib.redirect_stdout(io.StringIO()),  # pycocotools prints while it reads annotations
        blaming("the calibration data set does not build"),
    ):
        return DATASETS.build(_calibration_config(config, pipeline))


def _calibration_config(config: Mapping[str, Any], pipeline: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    parts = [_calibration_config(part, pipeline) for part in wrapped(config)]
    if "datasets" in config:
        return {**config, "datasets": parts}
    if parts:
        return parts[0]
    return {**copy.deepcopy(dict(config)), "pipeline": copy.deepcopy(pipeline), "test_mode": True}


def _gathered(mine: list, workers: Workers) -> list:
    """The rows of all processes; some twice, where a sampler gave each process as many images."""
    return [row for rows in workers.in_order([mine], workers.size) for row in rows]


def _detect(dataloader: DataLoader, model: BoxPromptedSAM, workers: Workers) -> list:
    """Rows (image id, (boxes, labels, scores)) as plain lists, of this process's images."""
    batches = tqdm(dataloader, desc="detect", unit="batch", disable=not workers.is_first)
    return [(img_id, prompts.to_lists()) for batch in batches for img_id, prompts in _prompt(model, batch)]


@torch.no_grad()
def _prompt(model: BoxPromptedSAM, batch: dict) -> list[tuple[int | str, BoxPrompts]]:
    data = model.data_preprocessor(batch, False)
    samples = data["data_samples"]
    prompts = model.prompt(data["inputs"], samples)
    return [(sample.img_id, boxes) for sample, boxes in zip(samples, prompts, strict=True)]
