# SPDX-License-Identifier: Apache-2.0
"""An estimate of relative energy: how many nets of a processing element change for each multiply-accumulate.

The elements of ``baseline`` as gates (``hls.rtl.gates``), on the operands of one layer: float32 as they are, and as
codes of 8 and 4 bits. Every change of every net counts the same, whatever the gate and the length of its wire; buffers,
memory and clock are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ahcq_plugin.export import UniformOperand
from ahcq_plugin.export.codes import encode
from ahcq_plugin.export.operands import top
from ahcq_plugin.hls.engine.baseline import element_rtl
from ahcq_plugin.hls.engine.config import LANES
from ahcq_plugin.hls.rtl.errors import ToolError
from ahcq_plugin.hls.rtl.gates import COMMANDS, STREAMS, gates, of_streams, to_streams
from ahcq_plugin.support.cache import Cache
from ahcq_plugin.support.digest import digest
from ahcq_plugin.zoo.items import scene_items
from ahcq_plugin.zoo.predict import make_batch
from ahcq_plugin.zoo.sam import box_forward, build_sam

FORMAT = "ahcq_plugin.hls.engine.toggles/1"  # of the cache: raise it where the simulation changes
ROWS = 8  # that the element of float32 has in work
#: Number format -> bits of its codes; None: floats.
FORMATS: dict[str, int | None] = {"INT4": 4, "INT8": 8, "FP32": None}
#: Whose operands ``packaged_rows`` takes.
LAYER = "image_encoder.blocks.0.mlp.lin1"
_WARM = 8  # cycles of reset
_DRAIN = 64  # cycles after the last operands, more than any element has stages


def element_run(
    number: str, left: np.ndarray, right: np.ndarray, cache: Path | None = None, limit: float | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """``STREAMS`` elements side by side, each with a column of its own, all with the same rows.

    An element of integers takes one row after the other, that of float32 ``ROWS`` rows in turn.

    Args:
        left: (rows, k), rows a multiple of ``ROWS``, k of ``LANES``; uint8 codes or float32.
        right: (STREAMS, k), of the same dtype.
        limit: seconds of a core for yosys.
    Returns:
        (sums (rows, STREAMS), uint32 or float32; row of the report: ``element``, ``gates``, ``flops``, ``changes`` of
        nets for each multiply-accumulate).
    Raises:
        ToolError: a package of the extra ``rtl`` is missing, or yosys takes longer.
    """
    rtl = element_rtl(number, cache)
    made = gates("\n".join(rtl.files.values()), rtl.design.top, limit)
    order, words = _words(left, right, FORMATS[number] is None)
    cycles = _WARM + len(order) + _DRAIN
    data = np.zeros((cycles, len(made.ports["in_data"])), np.uint64)
    data[_WARM : _WARM + len(order)] = words[:, : data.shape[1]]
    always, never = np.full((cycles, 1), 2**64 - 1, np.uint64), np.zeros((cycles, 1), np.uint64)
    sent, reset = never.copy(), never.copy()
    sent[_WARM : _WARM + len(order)] = always[0]
    reset[: _WARM // 2] = always[0]
    inputs = dict(in_data=data, in_valid=sent, out_ready=always, rst=reset, clk=never)
    found, changes = made.run(inputs, ("in_ready", "out_valid", "out_data"), _WARM)
    if not found["in_ready"][_WARM : _WARM + len(order)].all():
        raise ToolError(f"the element {number} does not take operands every cycle")
    came = np.flatnonzero(found["out_valid"][:, 0])
    bits = of_streams(found["out_data"][came])  # (streams, outputs, 32)
    sums = np.packbits(bits, axis=-1, bitorder="little").view(np.uint32)[..., 0].T
    kind = left.dtype if left.dtype == np.float32 else np.uint32
    result = np.empty((len(left), STREAMS), kind)
    rows = np.array([row for row, _, gives in order if gives])
    result[rows] = np.ascontiguousarray(sums).view(kind)
    flops, macs = made.flops.shape[1], left.size * STREAMS
    return result, dict(element=number, gates=made.gates, flops=flops, changes=changes / macs)


def _words(left: np.ndarray, right: np.ndarray, together: bool) -> tuple[list[tuple[int, int, bool]], np.ndarray]:
    """((row, fold, whether it is the last) of each turn, uint64 (turns, bits) of the struct ``pe_inputs``)."""
    folds = left.shape[1] // LANES
    blocks = range(0, len(left), ROWS)
    if together:
        turns = [(block + row, fold) for block in blocks for fold in range(folds) for row in range(ROWS)]
    else:
        turns = [(row, fold) for row in range(len(left)) for fold in range(folds)]
    kind = np.dtype([("left", left.dtype, LANES), ("right", left.dtype, LANES), ("flags", "u1", 3)], align=True)
    words = np.zeros((STREAMS, len(turns)), kind)
    for at, (row, fold) in enumerate(turns):
        part = slice(fold * LANES, (fold + 1) * LANES)
        words["left"][:, at], words["right"][:, at] = left[row, part], right[:, part]
        words["flags"][:, at] = row % ROWS, fold == 0, fold == folds - 1
    octets = words.view(np.uint8).reshape(STREAMS, len(turns), kind.itemsize)
    bits = np.unpackbits(octets, axis=-1, bitorder="little")
    return [(row, fold, fold == folds - 1) for row, fold in turns], to_streams(bits)


@torch.no_grad()
def layer_operands(
    model: nn.Module, layer: str, forward: Callable[[nn.Module], Any], rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """float32 (rows, k) of a Linear's inputs, evenly over its rows, and (STREAMS, k) of its weight."""
    module = model.get_submodule(layer)
    taken: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0].flatten(0, -2).cpu()))
    try:
        forward(model)
    finally:
        hook.remove()
    places = torch.linspace(0, len(taken[0]) - 1, rows).long()
    weight = module.get_parameter("weight").detach().cpu()
    return taken[0][places].numpy(), weight[torch.linspace(0, len(weight) - 1, STREAMS).long()].numpy()


def codes(x: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes of float32 x, uniform between its least and largest number (0 among them)."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = np.float32(max(high - low, 1e-20) / top(bits))
    return encode(UniformOperand(bits, scale, int(np.rint(-low / scale))), x).astype(np.uint8)


def toggle_rows(
    x: np.ndarray, weight: np.ndarray, cache: Path | None = None, limit: float | None = None
) -> list[dict[str, Any]]:
    """A row for each number format: changes of nets for a multiply-accumulate, and their ratio to those of INT4.

    Args:
        x, weight: of ``layer_operands``; codes are uniform, one scale for x, one for each column of the weight.
        cache: folder for RTL and results, by content.
    """
    rows: list[dict[str, Any]] = []
    for number, bits in FORMATS.items():
        left = x if bits is None else codes(x, bits)
        right = weight if bits is None else np.stack([codes(column, bits) for column in weight])
        rows.append(_kept_row(number, left, right, cache, limit))
    return [row | dict(ratio=row["changes"] / rows[0]["changes"]) for row in rows]


def _kept_row(
    number: str, left: np.ndarray, right: np.ndarray, cache: Path | None, limit: float | None
) -> dict[str, Any]:
    """The row of ``element_run``, from ``cache`` where it is there."""
    return Cache(cache).fetch(
        f"toggles_{number}",
        lambda: digest([FORMAT, COMMANDS, element_rtl(number, cache).files, left, right]),
        lambda: element_run(number, left, right, cache, limit)[1],
    )


def packaged_rows(cache: Path | None = None, limit: float | None = None) -> list[dict[str, Any]]:
    """``toggle_rows`` of the packaged SAM: 16 rows and 64 columns of an MLP of its encoder, on a generated scene."""
    sam, item = build_sam("sam_tiny"), next(iter(scene_items(1, seed=7)))
    batch = make_batch(sam, item.image, item.boxes[:1])
    operands = layer_operands(sam, LAYER, lambda model: box_forward(model, batch), 2 * ROWS)
    return toggle_rows(*operands, cache, limit)
