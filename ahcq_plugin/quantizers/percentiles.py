# SPDX-License-Identifier: Apache-2.0
"""Ranges that leave a share of the values out, for a choice among them that is made when all items were seen."""

from __future__ import annotations

import torch
from torch import Tensor

from ahcq_plugin.quantizers.observers import AvgMinMaxObserver
from ahcq_plugin.quantizers.sampling import strided

#: SAQ-SAM's: a candidate range goes from the (1 - p)-th to the p-th quantile.
PERCENTILES = (
    *(0.85, 0.87, 0.88, 0.89, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.965, 0.97, 0.975, 0.98, 0.983, 0.985, 0.987),
    *(0.989, 0.99, 0.993, 0.995, 0.997, 0.999, 0.9993, 0.9995, 0.9997, 0.9999, 0.99999),
)
#: Values of a call, per range, that quantiles are taken of.
MOST_VALUES = 2**18


class PercentileObserver(AvgMinMaxObserver):
    """Mean over calls of the minimum and the maximum, and of the quantiles of ``PERCENTILES``.

    Quantiles are interpolated between the two nearest values, of at most ``MOST_VALUES`` evenly strided ones. They
    serve calibration only and are not in the state dict; without a choice (``ptq/focus.py``) the range is that of the
    mean minimum and maximum.
    """

    def __init__(self, quant_min: int = 0, quant_max: int = 255, ch_axis: int = -1):
        super().__init__(quant_min, quant_max, ch_axis)
        self.register_buffer("ends", torch.zeros(0), persistent=False)

    def reset(self) -> None:
        super().reset()
        self.ends = self.ends.new_zeros(0)

    def summary(self, x: Tensor, ahead: bool = False) -> tuple:
        rows = strided(self.rows(x.float()).T, MOST_VALUES).T.sort(1).values
        shares = torch.tensor(PERCENTILES, dtype=torch.float64, device=x.device)
        return *super().summary(x, ahead), torch.stack([_quantiles(rows, 1 - shares), _quantiles(rows, shares)])

    def absorb(self, summary: tuple) -> None:
        *extremes, ends = summary
        seen = self.calls
        super().absorb(tuple(extremes))
        self.ends = self.ends + (ends - self.ends) / (seen + 1) if seen else ends

    def ranges(self) -> list[tuple[Tensor, Tensor]]:
        """Candidates (lo, hi), each (channels,): first the whole range, then ever less of it.

        Raises:
            RuntimeError: nothing was observed, or values that are not finite.
        """
        self.check_seen()
        if not self.ends.numel():
            raise RuntimeError("the observer has no quantiles left of its calibration: run `calibrate` again")
        self.check_finite(self.min_val, self.max_val, self.ends.flatten())
        lows, highs = self.ends
        return [(self.min_val, self.max_val), *zip(lows.flip(0), highs.flip(0), strict=True)]


def _quantiles(rows: Tensor, shares: Tensor) -> Tensor:
    """(shares, channels) quantiles of sorted ``rows`` (channels, values), linear between neighbours."""
    places = shares * (rows.shape[1] - 1)
    below = places.floor().long()
    above = (below + 1).clamp(max=rows.shape[1] - 1)
    return torch.lerp(rows[:, below], rows[:, above], (places - below).to(rows.dtype)).T.contiguous()
