# SPDX-License-Identifier: Apache-2.0
"""What is quantized of each SAM that the configs name: shares of weights and of products, and what is left."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ahcq_plugin.ptq import Recipe, prepare
from ahcq_plugin.ptq.coverage import IN_UNITS, INTEGERS, OUTSIDE, Coverage, cover
from ahcq_plugin.ptq.macs import count_macs
from ahcq_plugin.zoo.sam import box_forward, build_sam
from ahcq_plugin.zoo.sam2 import build_sam2
from ahcq_plugin.zoo.track import clip_forward

SAMS = ("sam_tiny", "vit_b", "vit_l", "vit_h")
SAM2S = ("sam2_tiny", "sam2_t", "sam2_s", "sam2_bp")
BOXES, FRAMES = 16, 3
#: Parts outside of units with a smaller share of the multiply-accumulates are summed up.
WORTH_NAMING = 0.001


def sam_coverage(name: str) -> Coverage:
    """Of a SAM with ``BOXES`` boxes on one image; nothing is computed, so its size does not matter."""
    with torch.device("meta"):
        sam = build_sam(name, checkpoint=False)
    side = sam.image_encoder.img_size
    item = {
        "image": torch.zeros(1, 3, side, side, device="meta"),
        "boxes": torch.zeros(BOXES, 4, device="meta"),
    }
    prepare(sam, Recipe.from_config("rtn"))
    return cover(sam, count_macs(sam, item, box_forward).counts)


def sam2_coverage(name: str) -> Coverage:
    """Of a SAM 2 that follows one object through ``FRAMES`` frames; it runs, with random weights."""
    torch.manual_seed(0)
    predictor = build_sam2(name, checkpoint=False)
    side = predictor.image_size
    mask = torch.zeros(1, side, side, dtype=torch.int64)
    mask[:, : side // 2, : side // 2] = 1
    clip = {"frames": torch.zeros(FRAMES, 3, side, side), "masks": mask}
    prepare(predictor, Recipe.from_config("rtn"))
    return cover(predictor, count_macs(predictor, clip, clip_forward).counts)


def coverage_page(coverages: Sequence[tuple[str, Coverage]]) -> str:
    """Markdown of (name of the SAM, coverage)."""
    lines = [
        "# What is quantized",
        "",
        "Shares of weights and of multiply-accumulates by where they are: on integers, in floating point inside units,",
        "and in floating point outside of them. Every recipe and every detector has the same units, so a row stands",
        f"for all configs of its SAM: {BOXES} boxes on an image, or one object in {FRAMES} frames. Made by",
        "`python tools/coverage_table.py`; a run's own shares are printed with its table and stand in `metrics.json`.",
        "",
        "| SAM | weights: integers | in units | outside | products: integers | in units | outside |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, coverage in coverages:
        shares = [coverage.share(kind, of) or 0 for of in ("weights", "macs") for kind in (INTEGERS, IN_UNITS, OUTSIDE)]
        lines.append(f"| `{name}` | " + " | ".join(f"{share:.2%}" for share in shares) + " |")
    lines += ["", "What is left, with its share of the multiply-accumulates (the largest first):", ""]
    for name, coverage in coverages:
        lines.append(f"- `{name}`: {'; '.join(_parts(coverage))}.")
    return "\n".join(lines) + "\n"


def _parts(coverage: Coverage) -> list[str]:
    total = sum(part.macs or 0 for part in coverage.parts)
    rest = [part for part in coverage.parts if part.kind != INTEGERS and part.macs]
    named = [part for part in rest if part.macs / total >= WORTH_NAMING]
    texts = [f"{part.name} ({part.kind}) {part.macs / total:.2%}" for part in named]
    few = sum(part.macs for part in rest if part not in named)
    return texts + ([f"others {few / total:.2%}"] if few else [])
