# SPDX-License-Identifier: Apache-2.0
"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ahcq_plugin.ptq.coverage import INTEGERS

#: Key in metrics.json, label. A run has those that its prompts and data allow.
ROWS = {
    "AP": "mask AP",
    "AP50": "mask AP50",
    "AP_gt": "mask AP, true boxes",
    "AP50_gt": "mask AP50, true boxes",
    "mIoU": "mIoU, true boxes",
    "IoU_fp": "IoU to FP masks, true boxes",
    "IoU_fp_small": "of FP masks below 32 x 32 pixels",
    "IoU_fp_medium": "below 96 x 96 pixels",
    "IoU_fp_large": "of larger ones",
    "mIoU_click1": "mIoU, 1 click",
    "IoU_fp_click1": "IoU to FP masks, 1 click",
    "mIoU_click3": "mIoU, 3 clicks",
    "IoU_fp_click3": "IoU to FP masks, 3 clicks",
    "mIoU_mask": "mIoU, mask input",
    "IoU_fp_mask": "IoU to FP masks, mask input",
    "recall_everything": "everything mode, true masks found",
    "recall_fp_everything": "everything mode, FP masks found",
    "J&F": "J&F",
    "J": "J (region)",
    "F": "F (boundary)",
    "J_fp": "J to FP masks",
}


def result_table(metrics: Mapping[str, Any]) -> Table:
    """Floating point, quantized and what was lost, from the content of ``metrics.json``."""
    w_bits, a_bits = metrics["bits"]
    table = Table(title=f"{metrics['recipe']} W{w_bits}A{a_bits}")
    table.add_column("")
    for name in ("FP", "quantized", "loss"):
        table.add_column(name, justify="right")
    for key, label in ROWS.items():
        before, after = metrics["fp"].get(key), metrics["quantized"].get(key)
        if after is not None:
            loss = None if before is None else before - after
            table.add_row(label, *("" if value is None else f"{value:.4f}" for value in (before, after, loss)))
    return table


def everything_lines(metrics: Mapping[str, Any]) -> list[str]:
    """What everything mode gave and took, from ``metrics.json``; nothing where it was not asked for."""
    return [
        f"everything mode, {name}: {row['masks']} masks of {row['images']} images, "
        f"{row['seconds_per_image']:.2f} seconds an image"
        for name, row in metrics.get("everything", {}).items()
    ]


def coverage_lines(coverage: Mapping[str, Any]) -> list[str]:
    """How much computes on integers, and by name what does not, from ``metrics.json``: a line a kind."""
    lines = []
    for kind, shares in coverage["shares"].items():
        names = [part["name"] for part in coverage["parts"] if part["kind"] == kind]
        shown = "" if kind == INTEGERS else f" ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''})"
        weights, macs = (shares[of] or 0.0 for of in ("weights", "macs"))
        lines.append(f"{kind}: {weights:.2%} of the weights, {macs:.2%} of the multiply-accumulates{shown}")
    return lines


def size_line(files: Mapping[str, int]) -> str:
    """Sizes of the checkpoints, from ``metrics.json``: name -> bytes."""
    return ", ".join(f"{name}: {size / 1e6:.2f} MB" for name, size in files.items())


def stage_table(stages: Mapping[str, Mapping[str, float]]) -> Table:
    """Seconds and peak memory of every stage."""
    table = Table(title="stages")
    table.add_column("")
    for name in ("seconds", "peak MiB"):
        table.add_column(name, justify="right")
    for name, values in stages.items():
        table.add_row(name, f"{values['seconds']:.1f}", f"{values['peak_bytes'] / 2**20:,.0f}")
    return table
