# SPDX-License-Identifier: Apache-2.0
"""Everything mode: segment-anything's automatic masks of whole images, what they find again and how long they take."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from pycocotools import mask as coco_mask
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam
from tqdm import tqdm

from ahcq_plugin.mm.evaluation import masks
from ahcq_plugin.mm.evaluation.records import ImageRecord
from ahcq_plugin.mm.options import Options
from ahcq_plugin.support.workers import ALONE, Workers

#: IoU from which a mask counts as found.
FOUND_IOU = 0.5


@dataclass(frozen=True)
class EverythingOptions(Options):
    """``test_cfg.everything``.

    Args:
        num_images: the first images with objects.
        points_per_side, points_per_batch, pred_iou_thresh, stability_score_thresh, box_nms_thresh: of
            ``SamAutomaticMaskGenerator``, with its defaults, which are made for a ViT-H.
    """

    KEY: ClassVar[str] = "everything"
    COUNTS: ClassVar[tuple[str, ...]] = ("num_images", "points_per_side", "points_per_batch")
    MOST: ClassVar[Mapping[str, int]] = {"points_per_side": 1024}

    num_images: int = 8
    points_per_side: int = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    box_nms_thresh: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("pred_iou_thresh", "stability_score_thresh", "box_nms_thresh"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"everything: `{key}` must be a number from 0 to 1, got {value!r}")


@dataclass(frozen=True)
class Everything:
    """What everything mode gave.

    Args:
        found: image id -> its masks.
        seconds: of an image, encoder included, mean.
    """

    found: dict[int | str, list[masks.RLE]]
    seconds: float

    @property
    def count(self) -> int:
        """Masks of all images."""
        return sum(map(len, self.found.values()))

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON, where keys would become strings."""
        return {"found": list(self.found.items()), "seconds": self.seconds}

    @staticmethod
    def from_json(content: dict[str, Any]) -> Everything:
        """Inverse of :meth:`to_json`."""
        return Everything(dict(content["found"]), content["seconds"])


def found_again(found: Sequence[masks.RLE], wanted: Sequence[masks.RLE]) -> int:
    """How many of ``wanted`` have an IoU of at least :data:`FOUND_IOU` with one of ``found``."""
    if not found or not wanted:
        return 0
    overlaps = coco_mask.iou(list(found), list(wanted), [0] * len(wanted))
    return int((overlaps.max(0) >= FOUND_IOU).sum())


def segment_everything(
    sam: Sam,
    records: Sequence[ImageRecord],
    options: EverythingOptions,
    reference: Everything | None = None,
    desc: str = "everything mode",
    workers: Workers = ALONE,
) -> tuple[Everything, dict[str, float]]:
    """Masks of whole images, and ``recall_everything``: the share of annotated objects among them; with ``reference``
    also ``recall_fp_everything``: the share of its masks among them, where it has any.

    Args:
        records: the first ``options.num_images`` with objects are taken.
        workers: processes that share the images; every one of them gets everything.
    """
    chosen = [record for record in records if len(record.truth)][: options.num_images]
    settings = {key: value for key, value in asdict(options).items() if key != "num_images"}
    generator = SamAutomaticMaskGenerator(sam, output_mode="coco_rle", **settings)
    mine = []
    for index in tqdm(workers.share(len(chosen)), desc=desc, unit="image", disable=not workers.is_first):
        image = chosen[index].read()
        started = time.perf_counter()
        rows = generator.generate(image)
        mine.append(([row["segmentation"] for row in rows], time.perf_counter() - started))
    given = workers.in_order(mine, len(chosen))
    found = {record.img_id: rles for record, (rles, _) in zip(chosen, given, strict=True)}
    everything = Everything(found, sum(seconds for _, seconds in given) / len(chosen))
    figures = {"recall_everything": _recall(found, {record.img_id: record.truth_masks() for record in chosen})}
    if reference is not None and reference.count:
        figures["recall_fp_everything"] = _recall(found, reference.found)
    return everything, figures


def _recall(found: dict[int | str, list[masks.RLE]], wanted: dict[int | str, list[masks.RLE]]) -> float:
    hits = sum(found_again(found[img_id], rles) for img_id, rles in wanted.items())
    return hits / sum(map(len, wanted.values()))
