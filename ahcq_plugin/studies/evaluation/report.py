# SPDX-License-Identifier: Apache-2.0
"""All figures of a model card in one dict, and as Markdown tables."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from segment_anything.modeling import Sam

from ahcq_plugin.studies.evaluation.iou import SIZES, compare, mean_iou_by_size, model_answer
from ahcq_plugin.studies.evaluation.precision import METRICS, detector_prompts, ground_truth_prompts, mask_ap
from ahcq_plugin.studies.evaluation.rtn import PARTS, round_weights
from ahcq_plugin.studies.evaluation.stats import attention_kind, channel_kind
from ahcq_plugin.zoo.coco import check_coco, read_detections
from ahcq_plugin.zoo.items import TEST_SCENES, Item, coco_items, scene_items

logger = logging.getLogger(__name__)
BITS = (8, 4, 3, 2)
LOWEST_SCORE = 0.05  # of detections used as prompts
RTN_PARTS = {"encoder": PARTS[:1], "decoder": PARTS[1:], "both": PARTS}


def evaluate(sam: Sam, coco: str | Path | None = None, scenes: int = TEST_SCENES) -> dict[str, Any]:
    """Mean IoU by size, dependence on the image, round-to-nearest weights and, with a COCO folder, mask AP.

    ``coco`` may also hold ``yolox_nano_bbox.json`` (COCO results format); its boxes are then used as prompts too.

    Raises:
        FileNotFoundError, ValueError: the COCO folder cannot be used; before anything is computed.
    """
    detections = None
    if coco:
        check_coco(str(Path(coco, "instances.json")), str(Path(coco, "images")), masks=True)
        boxes = Path(coco) / "yolox_nano_bbox.json"
        detections = read_detections(boxes) if boxes.is_file() else None

    def scene_set() -> Iterator[Item]:
        return scene_items(scenes, size=sam.image_encoder.img_size)

    sets = {"scenes": scene_set, **({"images": lambda: coco_items(coco)} if coco else {})}
    result: dict[str, Any] = {"iou": {}, "rtn": {}, "ap": {}}
    for name, items in sets.items():
        result["iou"][name] = compare(sam, items())
        logger.info("mean IoU on %s: %s", name, result["iou"][name])
        result["rtn"][name] = defaultdict(dict)
        for part, modules in RTN_PARTS.items():
            for bits in BITS:
                rounded = round_weights(sam, bits, modules)
                value = mean_iou_by_size(items(), {"model": model_answer(rounded)})["model"]["all"]
                result["rtn"][name][part][str(bits)] = value
                logger.info("%s: %s at %d bits: %.4f", name, part, bits, value)
    if coco:
        result["ap"]["ground-truth boxes"] = mask_ap(sam, coco, ground_truth_prompts(coco))
        if detections is not None:
            result["ap"]["YOLOX-nano boxes"] = mask_ap(sam, coco, detector_prompts(coco, detections, LOWEST_SCORE))
    return result


def evaluation_tables(result: dict[str, Any]) -> str:
    """Markdown for the result of :func:`evaluate`."""
    parts = []
    for name, table in result["iou"].items():
        counts = table["objects"]
        parts.append(
            _table(
                [f"mean IoU, {name}", *(f"{size} ({counts[size]})" for size in SIZES)],
                [[kind, *(row[size] for size in SIZES)] for kind, row in table.items() if kind != "objects"],
            )
        )
    for name, table in result["rtn"].items():
        full = result["iou"][name]["model"]["all"]
        parts.append(
            _table(
                [f"round-to-nearest weights, {name}", "float", *(f"{bits} bits" for bits in BITS)],
                [[part, full, *(row[str(bits)] for bits in BITS)] for part, row in table.items()],
            )
        )
    for name, table in result["ap"].items():
        parts.append(_table([f"mask AP, {name}", *METRICS], [[kind, *row.values()] for kind, row in table.items()]))
    return "\n\n".join(parts) + "\n"


def statistics_tables(conditions: dict[str, float], activations: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown for condition numbers and activation statistics, the modules of one kind put together."""
    parts = []
    groups: dict[str, list[float]] = defaultdict(list)
    for name, value in conditions.items():
        groups[name.split(".")[0]].append(value)
    parts.append(
        _table(
            ["condition numbers of Linear weights", "layers", "median", "largest", "above 100"],
            [[part, len(v), float(np.median(v)), max(v), sum(x > 100 for x in v)] for part, v in groups.items()],
        )
    )
    for key, title, kind in (
        ("gelu", "post-GELU", lambda n: n.split(".")[0]),
        ("softmax", "post-softmax", attention_kind),
        ("channels", "channel ranges", channel_kind),
    ):
        rows: dict[str, list[dict[str, float]]] = defaultdict(list)
        for name, row in activations[key].items():
            rows[kind(name)].append(row)
        columns = list(next(iter(activations[key].values())))
        pick = {"min": min, "max": max, "max/median": max, "max/min": max}
        parts.append(
            _table(
                [f"{title} (extremes, else medians over modules)", "modules", *columns],
                [
                    [group, len(members), *(float(pick.get(c, np.median)([m[c] for m in members])) for c in columns)]
                    for group, members in rows.items()
                ],
            )
        )
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    def cell(value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 1000 else f"{value:.2g}"

    lines = [head, ["---"] * len(head), *([cell(v) for v in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
