# SPDX-License-Identifier: Apache-2.0
"""Which method survives which challenge: twins of ``sam_tiny`` with one challenge planted, or all, quantized by each.

Figures of a run are kept as JSON, with a hash of what determines them: a new packaged ``sam_tiny``, other settings of
the twin or of a method make them invalid, and the next fill makes them again.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ahcq_plugin.api import quantize
from ahcq_plugin.export.compare import mask_overlap
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.studies.equalization import equalize
from ahcq_plugin.support.digest import digest
from ahcq_plugin.support.files import read_json, sha256_of, write_json
from ahcq_plugin.support.typed import typed
from ahcq_plugin.zoo.checkpoints import default_checkpoint
from ahcq_plugin.zoo.hard import SAM_TINY_HARD, Hardness, harden, knobs
from ahcq_plugin.zoo.items import scene_items
from ahcq_plugin.zoo.predict import make_batch
from ahcq_plugin.zoo.sam import box_forward, build_sam

#: Name -> what is planted; "all" is ``build_sam("sam_tiny_hard")``.
CHALLENGES = {"none": Hardness(), "all": SAM_TINY_HARD, **{knob: SAM_TINY_HARD.only(knob) for knob in knobs()}}
BITS = 4
CALIBRATION, HELD_OUT = 16, 32  # generated scenes, the latter the first of the test scenes
CALIBRATION_SEED = 20260215
BOXES = 8  # at most so many of a scene
_AGAIN = "delete it, and it is made again"


@dataclass(frozen=True)
class _Stored:
    """The file of a cell."""

    key: str
    iou: list[list[float]]
    seconds: float


@dataclass(frozen=True)
class Method:
    """A recipe's name and keys, and whether channels are equalized first."""

    label: str
    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    equalized: bool = False

    @property
    def name(self) -> str:
        """Part of a file's name."""
        return self.label.lower().replace(" + ", "-").replace(", ", "-").replace(" ", "_")

    def settings(self) -> Recipe:
        """The recipe with its bits."""
        return Recipe.from_config({"name": self.recipe, "w_bits": BITS, "a_bits": BITS, **self.options})


_NOT_LEARNED = {"granularity": "none", "learn_scales": False, "quantize_activations": False}
_LEARNED = {"iterations": 300, "rounding_lr": 3e-2, "scale_lr": 2.7e-3}  # as mm_configs/_base_/quant/ahcq_w4a4_short.py
#: ``ahcq_plus`` as it was before it centred heads and norms, and with either: what is said of it, and its keys.
LESS_CENTRED = {
    "nothing": {"center": False, "center_norms": False},
    "heads alone": {"center_norms": False},
    "norms alone": {"center": False},
}
_QUANTIZERS = {"cag": True, "hluq": True, "lnq": True}
#: Calibrated alone: what the quantizers can do, not what rounding that was learned repairs.
CALIBRATED = (
    Method("rtn", "rtn"),
    Method("ahcq", "ahcq", _NOT_LEARNED),
    Method("ptq4sam", "ptq4sam", _NOT_LEARNED),
    Method("rtn + CAG", "rtn", {"cag": True}),
    Method("rtn + CAG, HLUQ, LNQ", "rtn", _QUANTIZERS),
    Method("rtn + CAG, HLUQ, LNQ + centred norms", "rtn", {**_QUANTIZERS, "center_norms": True}),
    Method("rtn + equalization", "rtn", equalized=True),
    Method("ahcq + equalization", "ahcq", _NOT_LEARNED, True),
    Method("rtn + HLUQ", "rtn", {"hluq": True}),
    Method("rtn + LNQ", "rtn", {"lnq": True}),
    Method("rtn + ACNR", "rtn", {"acnr": True}),
    Method("rtn + BIG", "rtn", {"big": True}),
)
RECONSTRUCTED = (
    *(Method(f"{n}, reconstructed", n, _LEARNED) for n in ("ahcq", "ahcq_plus", "ptq4sam", "saqsam", "qdrop")),
    Method("ahcq without ACNR, reconstructed", "ahcq", {**_LEARNED, "acnr": False}),
    *(
        Method(f"ahcq_plus {what} centred, reconstructed", "ahcq_plus", {**_LEARNED, **less})
        for what, less in LESS_CENTRED.items()
    ),
)


@dataclass(frozen=True)
class Cell:
    """One method on one challenge."""

    challenge: str
    method: Method

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.challenge}-{self.method.name}"

    def key(self) -> str:
        """Hash of weights, challenge, method and data."""
        content = [
            _weights(default_checkpoint("sam_tiny")),
            asdict(CHALLENGES[self.challenge]),
            self.method.settings().to_hash(),
            self.method.equalized,
            [CALIBRATION, CALIBRATION_SEED, HELD_OUT, BOXES],
        ]
        return digest(json.loads(json.dumps(content)))


@functools.cache
def _weights(path: Path) -> str:
    return sha256_of(path)


def cells(methods: Iterable[Method] = CALIBRATED) -> list[Cell]:
    """Every method on every challenge: first all of them on the extremes, then the single challenges."""
    chosen = list(methods)
    return [Cell(challenge, method) for challenge in CHALLENGES for method in chosen]


def read_cell(folder: Path, cell: Cell) -> list[list[float]] | None:
    """IoU of every object, image by image; None where there are no figures, or of other settings or weights.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / f"{cell.name}.json"
    if not path.is_file():
        return None
    stored = typed(read_json(path, _AGAIN), _Stored, f"{path}: its content")
    objects = [value for image in stored.iou for value in image]
    if not objects or not 0 <= min(objects) <= max(objects) <= 1:
        raise ValueError(f"{path} holds figures that are no overlaps of masks; {_AGAIN}")
    return stored.iou if stored.key == cell.key() else None


def fill(folder: Path, wanted: Iterable[Cell], report: Callable[[str], None] = lambda line: None) -> None:
    """Run every cell that has no valid figures; each is written as soon as it is there.

    Raises: AuditError: a quantized model failed its audit.
    """
    missing = [cell for cell in wanted if read_cell(folder, cell) is None]
    if not missing:
        return
    calibration, held_out = (list(batches) for batches in _data())
    with torch.no_grad():  # every twin has the masks of the model it is made of
        expected = [box_forward(build_sam("sam_tiny"), item)[0] for item in held_out]
    for cell in missing:
        started = time.perf_counter()
        overlaps = measure(cell, calibration, held_out, expected)
        seconds = time.perf_counter() - started
        content = {"key": cell.key(), "iou": overlaps, "seconds": round(seconds, 1)}
        write_json(content, folder / f"{cell.name}.json", indent=None)
        objects = [value for image in overlaps for value in image]
        report(f"{cell.name}: {sum(objects) / len(objects):.4f} ({seconds:.0f} s)")


def measure(
    cell: Cell, calibration: list[dict[str, Tensor]], held_out: list[dict[str, Tensor]], expected: list[Tensor]
) -> list[list[float]]:
    """Quantize the twin, audited, and compare its masks with ``expected`` logits: IoU of every object, by image."""
    twin = twin_of(cell.challenge)
    if cell.method.equalized:
        equalize(twin, calibration, box_forward)
    settings = cell.method.settings()
    quantized, _ = quantize(twin, calibration, settings, forward=box_forward, inplace=True, progress=False)
    with torch.no_grad():
        found = [
            mask_overlap(logits, box_forward(quantized, item)[0])[0]
            for logits, item in zip(expected, held_out, strict=True)
        ]
    return [[round(value, 5) for value in image.tolist()] for image in found]


def twin_of(challenge: str) -> nn.Module:
    """``sam_tiny`` with a challenge planted."""
    return harden(build_sam("sam_tiny"), CHALLENGES[challenge])


def _data() -> Iterator[Iterator[dict[str, Tensor]]]:
    """Calibration items, then held-out ones."""
    sam = build_sam("sam_tiny")
    for seed, count in ((CALIBRATION_SEED, CALIBRATION), (None, HELD_OUT)):
        scenes = scene_items(size=sam.image_encoder.img_size, **({} if seed is None else {"seed": seed}))
        yield (make_batch(sam, item.image, item.boxes[:BOXES]) for item in islice(scenes, count))
