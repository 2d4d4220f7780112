# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs of a quantized SAM beside PyTorch (masks) and beside the same SAM in floating point (time)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ahcq_plugin.export import OnnxSam, export_onnx
from ahcq_plugin.export.compare import mask_overlap
from ahcq_plugin.studies.inference.timing import Times, in_turn
from ahcq_plugin.zoo.sam import box_forward


@dataclass(frozen=True)
class Parity:
    """One runtime, on one thread.

    Attributes:
        iou, least_iou: mean and least IoU of the masks to those of the fake-quantized model in PyTorch, over ``masks``.
        encoder, encoder_fp: milliseconds of an image, (least, median).
        decoder, decoder_fp: those of ``boxes`` boxes.
        encoder_ratio, decoder_ratio: median time in floating point by median time, measured in turn.
        load: of the machine, average of a minute, at the end.
    """

    runtime: str
    iou: float
    least_iou: float
    masks: int
    encoder: tuple[float, float]
    encoder_fp: tuple[float, float]
    encoder_ratio: float
    decoder: tuple[float, float]
    decoder_fp: tuple[float, float]
    decoder_ratio: float
    boxes: int
    load: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The row of a table in Markdown."""
        pairs = (self.encoder, self.encoder_fp, self.decoder, self.decoder_fp)
        times = [f"{least:.1f} / {half:.1f}" for least, half in pairs]
        encoder = f"{times[0]} | {times[1]} | {self.encoder_ratio:.2f}"
        decoder = f"{times[2]} | {times[3]} | {self.decoder_ratio:.2f} | {self.boxes}"
        return [f"| {self.runtime} | {self.iou:.3f} ({self.least_iou:.3f}) | {encoder} | {decoder} |"]


TITLES = (
    "| runtime | IoU to PyTorch (least) | encoder ms, least / median | FP32 | ratio | decoder ms | FP32 | ratio | "
    "boxes |\n|---|---|---|---|---|---|---|---|---|"
)


def measure(
    qmodel: nn.Module,
    floating: nn.Module,
    folder: str | Path,
    batches: Sequence[Mapping[str, Tensor]],
    runtimes: Sequence[str],
    runs: int = 7,
) -> list[Parity]:
    """Compare a folder that ``export_onnx`` wrote of ``qmodel`` with PyTorch, runtime by runtime.

    Args:
        qmodel: the fake-quantized model.
        floating: the same architecture without quantizers; its graphs are what times are compared with.
        batches: inputs of ``box_forward``; the first one is timed.
        runs: timed pairs of runs, after one that is not.
    """
    with torch.no_grad():
        wanted = [box_forward(qmodel, batch)[0] for batch in batches]
    with tempfile.TemporaryDirectory() as beside:
        export_onnx(floating, beside, style="float")
        return [_of_runtime(runtime, folder, beside, batches, wanted, runs) for runtime in runtimes]


def _of_runtime(
    runtime: str,
    folder: str | Path,
    beside: str,
    batches: Sequence[Mapping[str, Tensor]],
    wanted: Sequence[Tensor],
    runs: int,
) -> Parity:
    sams = [OnnxSam(path, 1, runtime) for path in (folder, beside)]
    overlaps = torch.cat([mask_overlap(w, sams[0](b)[0])[0] for w, b in zip(wanted, batches, strict=True)])
    image, boxes = batches[0]["image"].numpy(), batches[0]["boxes"].numpy()
    embeddings = np.asarray(sams[0].encoder({"image": image})[0])
    names = ("quantized", "floating")
    encoders = {n: lambda sam=sam: sam.encoder({"image": image}) for n, sam in zip(names, sams, strict=True)}
    decoders = {n: lambda sam=sam: sam.decode(embeddings, boxes=boxes) for n, sam in zip(names, sams, strict=True)}
    encoder, encoder_fp = map(_milliseconds, in_turn(encoders, runs).values())
    decoder, decoder_fp = map(_milliseconds, in_turn(decoders, runs).values())
    return Parity(
        runtime,
        float(overlaps.mean()),
        float(overlaps.min()),
        len(overlaps),
        encoder,
        encoder_fp,
        encoder_fp[1] / encoder[1],
        decoder,
        decoder_fp,
        decoder_fp[1] / decoder[1],
        len(boxes),
        os.getloadavg()[0],
    )


def _milliseconds(times: Times) -> tuple[float, float]:
    return 1e3 * times.least, 1e3 * times.median
