# SPDX-License-Identifier: Apache-2.0
"""Takes from the channels of a two-way decoder's LayerNorms what all tokens share; the model's function stays.

Channels whose values lie about different middles share a range, and in a group of channels a zero point, that has room
for all of the middles. A shift of each channel is free: biases of the Linears that read it take it up
(``prequant/streams.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ahcq_plugin.prequant.streams import Stream, shift_stream, two_way_streams
from ahcq_plugin.ptq.center import channel_middles
from ahcq_plugin.ptq.head_channels import TOLERANCE
from ahcq_plugin.ptq.loss import relative_error
from ahcq_plugin.ptq.prepared import quantization_off
from ahcq_plugin.support.batches import Forward, model_device, to_device
from ahcq_plugin.support.workers import ALONE, Workers

logger = logging.getLogger(__name__)


@torch.no_grad()
def center_norms(model: nn.Module, batches: Sequence[Any], forward: Forward, workers: Workers = ALONE) -> list[str]:
    """Put the middle of each channel's range over ``batches`` at 0, as the Linears behind a norm see it, in place.

    Left alone are models without a two-way transformer by the names of segment_anything and SAM 2, and norms that
    lack a bias somewhere or have a reader that sees no data. A norm whose shift would change the model's output on the
    first item by more than rounding (something else reads it, too) is put back, with a warning.

    Args:
        model: prepared; quantization is off afterwards as before.
        workers: the first one's ranges and results count.
    Returns:
        Names of the norms whose channels are centred.
    """
    streams = {name: stream for name, stream in two_way_streams(model) if all(b is not None for b in stream.biases)}
    with quantization_off(model):
        middles = workers.first(_middles(model, streams, batches, forward) if workers.is_first else None)
        item = to_device(batches[0], model_device(model))
        shifts = {name: (streams[name], -middle) for name, middle in middles.items()}
        done = _shift(model, shifts, item, forward, forward(model, item)) if shifts else []
    workers.copy(bias.data for stream in streams.values() for bias in stream.biases)
    return workers.first(done)


def _middles(
    model: nn.Module, streams: Mapping[str, Stream], batches: Sequence[Any], forward: Forward
) -> dict[str, Tensor]:
    """Name of a norm -> float64 (channels,), the mean over its readers of the middle of what each sees, on the CPU."""
    readers = {f"{name}:{n}": r for name, stream in streams.items() for n, r in enumerate(stream.readers)}
    seen = channel_middles(model, readers, batches, forward, lambda x, out: x)
    found = {}
    for name, stream in streams.items():
        keys = [f"{name}:{n}" for n in range(len(stream.readers))]
        if all(key in seen for key in keys):
            found[name] = torch.stack([seen[key] for key in keys]).mean(0)
    return found


def _shift(
    model: nn.Module, wanted: Mapping[str, tuple[Stream, Tensor]], item: Any, forward: Forward, target: Any
) -> list[str]:
    """Shift all at once, or one by one where the model's output would not be ``target``; names of those that stay."""
    before = {bias: bias.detach().clone() for stream, _ in wanted.values() for bias in stream.biases}
    for stream, offsets in wanted.values():
        shift_stream(stream, offsets.to(stream.norm.bias))
    error = relative_error(forward(model, item), target)
    if error <= TOLERANCE:
        return list(wanted)
    for bias, value in before.items():
        bias.data.copy_(value)
    if len(wanted) > 1:
        return [name for one in wanted.items() for name in _shift(model, dict([one]), item, forward, target)]
    logger.warning("%s: its channels are not centred: that would change the model's output by %.1e", *wanted, error)
    return []
