# SPDX-License-Identifier: Apache-2.0
"""Search of the range of an asymmetric uniform quantizer, per channel, under the error mean |x_hat - x|^p.

Per channel, with R = max(x, 0) - min(x, 0), the candidates are every width w = R * i / steps (i = 1..steps) with every
zero point z = 0..2^bits - 1, that is the ranges [-z * d, w - z * d], d = w / (2^bits - 1): 1600 of them at 4 bits.
The result is never worse than the best candidate, yet only a few candidates are evaluated on the data:

1. In units of R all channels share the same candidates. So the error of each candidate is bounded from below, bin by
   bin of a fixed grid, by straight lines (tangents of |.|^p, which is convex), and a channel is described by how its
   values spread over the two ends of their bins. The bounds of all candidates are then one matrix product, whose cost
   does not depend on the number of values.
2. The candidate of the lowest bound is evaluated exactly. Candidates whose bound exceeds that error cannot win.
3. The few that are left (1 to 30 as a rule) are evaluated exactly, in float64, and the best is refined off the grid.

Rounding of float32 is part of the bound: it moves every value and level by at most ``_NORM_SLACK`` * R, hence the
p-norm of the errors by no more than that (triangle inequality; this is why p >= 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .uniform import SCALE_EPS, check_bits, qparams_from_range

# Bins on each side of zero; up to four times as many where an evaluation on the data costs more than finer bins.
_BINS = 512
# Bins widen like |y| + origin, y = x / R, because most values of a channel with outliers are small.
_BIN_ORIGIN = 0.02
_NORM_SLACK = 16 * torch.finfo(torch.float32).eps
_REFINE_OFFSETS = (-0.5, -0.25, 0.25, 0.5)  # of the width, in steps of the grid
_REFINE_GAIN = 1e-6  # a refinement must gain more than what float32 scales can differ by
_MAX_BOUNDS, _MAX_CHANNELS = 2**25, 4096  # kept at a time: channels are searched in groups


def search_range(x: Tensor, bits: int, p: float = 2.4, steps: int = 100) -> tuple[Tensor, Tensor]:
    """Range per channel of which the quantizer has the least mean |x_hat - x|^p.

    Args:
        x: (C, N) floats, one channel per row; for a range per tensor pass (1, N). Searched as float32.
        bits: 2..8.
        p: >= 1; 2.4 as in BRECQ and QDrop.
        steps: number of widths tried, R / steps apart.
    Returns:
        lo, hi: (C,) float32, lo <= 0 <= hi, for ``qparams_from_range``. In float64 arithmetic the error of each channel
        is at most that of its best candidate. A channel of zeros has lo = hi = 0.
    Raises:
        ValueError: wrong shape or argument; values that are not finite or whose range overflows float32.

    Deterministic. Besides ``x`` it holds about 200 MB (two float64 numbers per bin and channel for at most 2^25 /
    candidates channels, and their bounds) and, per channel still in the race, a few numbers per candidate.
    """
    if check_bits(bits) > 8:
        raise ValueError(f"a range search is offered for 2 to 8 bits, got bits={bits}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`steps` must be a positive integer, got {steps!r}")
    _check(x, p)
    x = x.detach().float()
    span = x.amax(1).clamp_(min=0) - x.amin(1).clamp_(max=0)
    if not bool(torch.isfinite(span).all()):
        raise ValueError("`x` must be finite and its range must fit float32; look for inf, nan or overflow in the data")
    lo, hi = torch.zeros_like(span), torch.zeros_like(span)
    live = torch.nonzero(span > 0).squeeze(1)
    group = min(_MAX_CHANNELS, max(1, _MAX_BOUNDS // ((steps + 1) * 2**bits)))
    for channels in live.split(group):
        lo[channels], hi[channels] = _search(x, channels, span[channels], bits, p, steps)
    return lo, hi


def range_error(x: Tensor, lo: Tensor, hi: Tensor, bits: int, p: float = 2.4) -> Tensor:
    """Mean |x_hat - x|^p per channel for the quantizer of the range [min(lo, 0), max(hi, 0)].

    Args:
        x: (C, N) float32 or float64; arithmetic and result are of this type, scale and zero point those of
            ``qparams_from_range``.
        lo, hi: (C,) floats.
        bits: 2..16.
        p: >= 1.
    Returns:
        (C,) of x's type.
    """
    _check(x, p)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"`x` must be float32 or float64, got {x.dtype}")
    if lo.shape != x.shape[:1] or hi.shape != x.shape[:1]:
        raise ValueError(
            f"`lo` and `hi` must have shape ({x.shape[0]},), one number per row of `x`, got {tuple(lo.shape)} and "
            f"{tuple(hi.shape)}"
        )
    return _errors(x, torch.arange(x.shape[0], device=x.device), lo, hi, bits, p, x.dtype)


def _check(x: Tensor, p: float) -> None:
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"`x` must have shape (channels, values) with at least one value, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"`x` must be of a float type, got {x.dtype}")
    if not (1 <= p < math.inf):
        raise ValueError(f"`p` must be finite and at least 1, got {p!r}")


def _block_size(device: torch.device) -> int:
    """Elements worked on at a time: near the caches of a CPU yet few synchronisations of threads; enough for a GPU."""
    return 2**18 if device.type == "cpu" else 2**24


def _errors(x: Tensor, rows: Tensor, lo: Tensor, hi: Tensor, bits: int, p: float, dtype: torch.dtype) -> Tensor:
    """Mean |x_hat - x|^p, computed in ``dtype``, of row ``rows[k]`` of ``x`` under the range ``lo[k], hi[k]``: (K,)."""
    params = qparams_from_range(lo, hi, bits)
    scale, zero = params.scale.to(dtype)[:, None], params.zero_point.to(dtype)[:, None]
    total = torch.zeros(len(rows), dtype=torch.float64, device=x.device)
    size = _block_size(x.device)
    height = max(1, size // x.shape[1])
    for first in range(0, len(rows), height):
        block = slice(first, first + height)
        s, z = scale[block], zero[block]
        for part in x.split(size, dim=1):
            values = part[rows[block]].to(dtype)
            level = (values / s).round_().add_(z).clamp_(0, 2**bits - 1).sub_(z).mul_(s)
            # exp(p log e) is many times faster than pow on a CPU, and 0 stays 0
            total[block] += level.sub_(values).abs_().log_().mul_(p).exp_().sum(1)
    return (total / x.shape[1]).to(dtype)


def _search(x: Tensor, channels: Tensor, span: Tensor, bits: int, p: float, steps: int) -> tuple[Tensor, Tensor]:
    """lo, hi of the rows ``channels`` of ``x``, whose ``span`` R is positive."""
    levels = 2**bits
    bounds = _bounds(x, channels, span, bits, p, steps).flatten(1)

    def evaluate(local: Tensor, width: Tensor, zero: Tensor) -> Tensor:
        """The p-norm of the errors over R, float64, of the candidate (width, zero) of each channel ``local``."""
        lo, hi = _range(span[local], width, zero, levels - 1, steps)
        mean = _errors(x, channels[local], lo, hi, bits, p, torch.float64)
        return mean.pow_(1 / p).div_(span[local])

    everyone = torch.arange(len(channels), device=x.device)
    guess = bounds[:, levels:].argmin(1) + levels  # not from row 0, whose bound says nothing
    guess_error = evaluate(everyone, guess // levels, guess % levels)
    open_ = bounds <= (guess_error + _NORM_SLACK).pow_(p).float()[:, None]
    open_.scatter_(1, guess[:, None], False)
    local, candidate = torch.nonzero(open_).unbind(1)
    error = evaluate(local, candidate // levels, candidate % levels)
    best = guess_error.scatter_reduce(0, local, error, "amin")
    tied = error == best[local]
    winner = torch.where(guess_error == best, guess, bounds.shape[1])
    winner.scatter_reduce_(0, local[tied], candidate[tied], "amin")  # the first of equal ones
    width, zero = (winner // levels).double(), winner % levels

    best *= (1 - _REFINE_GAIN) ** (1 / p)
    chosen = width.clone()
    for offset in _REFINE_OFFSETS:
        trial = width + offset
        error = evaluate(everyone, trial, zero)
        chosen = torch.where(error < best, trial, chosen)
        best = torch.minimum(best, error)
    return _range(span, chosen, zero, levels - 1, steps)


def _range(span: Tensor, width: Tensor, zero: Tensor, qmax: int, steps: int) -> tuple[Tensor, Tensor]:
    """lo, hi (float32) of candidates: ``width`` in steps of R / steps, ``zero`` the zero point.

    Width 0 stands for all ranges so small that ``qparams_from_range`` raises their scale to ``SCALE_EPS``.
    """
    w = torch.where(width > 0, span * width.float() / steps, 0.999 * SCALE_EPS * qmax)
    step = w / qmax
    return -zero * step, w - zero * step


def _bounds(x: Tensor, channels: Tensor, span: Tensor, bits: int, p: float, steps: int) -> Tensor:
    """Lower bounds of the mean |x_hat - x|^p / R^p: (channels, steps + 1, 2^bits) float32, [c, i, z].

    Row i = 0 stands for the scale ``SCALE_EPS``: it bounds by 0 in channels where some widths fall below that scale
    (whose own rows are inf), and is inf in the others.
    """
    qmax = 2**bits - 1
    bins = _BINS * min(4, max(1, x.shape[1] * 2**bits // 2**23))
    nodes = _BIN_ORIGIN * torch.expm1(
        torch.linspace(0, math.log1p(1 / _BIN_ORIGIN), bins + 1, dtype=torch.float64, device=x.device)
    )
    nodes[-1] = 1.0
    spread = _spread(x, channels, span, nodes)
    bounds = torch.full((len(channels), steps + 1, qmax + 1), math.inf, device=x.device)
    widths = torch.arange(1, steps + 1, dtype=torch.float64, device=x.device)
    for width in widths.split(max(1, _block_size(x.device) // (nodes.numel() * (qmax + 1)))):
        lines = _lines(nodes, width / (steps * qmax), qmax, p)
        above, below = (spread @ lines.flatten(0, 1).T).unflatten(2, (len(width), qmax + 1))
        # with zero point z there are qmax - z levels above zero and z below it
        bounds[:, width.long()] = (above.flip(2) + below).div_(x.shape[1]).float()
    floored = span.double()[:, None] * widths < SCALE_EPS * (1 - 1e-6) * steps * qmax
    bounds[:, 1:].masked_fill_(floored[:, :, None], math.inf)
    bounds[:, 0].masked_fill_(floored.any(1)[:, None], 0)
    return bounds


def _spread(x: Tensor, channels: Tensor, span: Tensor, nodes: Tensor) -> Tensor:
    """How the values of each channel lie between the nodes: (2, channels, nodes) float64; values >= 0, then < 0.

    Each |x| / R shares its weight 1 between the two nodes around it such that its position is kept: the sum of weight
    times a function that is linear between nodes is exactly the sum of that function over the values.
    """
    count, size = nodes.numel(), _block_size(x.device)
    spread = torch.zeros(2 * len(channels) * count, dtype=torch.float64, device=x.device)
    height = max(1, size // x.shape[1])
    rows = torch.arange(len(channels), device=x.device)[:, None]
    for block in rows.squeeze(1).split(height):
        for part in x.split(size, dim=1):
            values = part[channels[block]].double().div_(span[block].double()[:, None])
            place = values.abs()
            bin_ = (place / _BIN_ORIGIN).log1p_().mul_((count - 1) / math.log1p(1 / _BIN_ORIGIN)).long()
            bin_.clamp_(max=count - 2)
            left = nodes[bin_]
            share = place.sub_(left).div_(nodes[bin_ + 1] - left).clamp_(0, 1)
            index = bin_.add_((values < 0) * (len(channels) * count)).add_(rows[block] * count).flatten()
            spread.scatter_add_(0, index, 1 - share.flatten())
            spread.scatter_add_(0, index + 1, share.flatten())
    return spread.view(2, len(channels), count)


def _lines(nodes: Tensor, scales: Tensor, qmax: int, p: float) -> Tensor:
    """Functions, linear between the nodes, below the error |y - s * min(round(y / s), top)|^p.

    Args:
        nodes: (B,) ascending from 0; scales: (S,) s.
    Returns:
        (S, qmax + 1, B) float64: values at the nodes for every scale and every top level 0..qmax.

    In a bin the error is the least of |y - level|^p over the levels of its ends. Tangents of all of them at the middle
    of the bin bound it; where a bin holds further levels between, 0 does.
    """
    start, end = nodes[:-1], nodes[1:]
    middle, half = (start + end) / 2, (end - start) / 2
    top = torch.arange(qmax + 1, dtype=nodes.dtype, device=nodes.device)[:, None]
    s = scales[:, None, None]
    nearest = torch.minimum((nodes / s).round_(), top)
    lines = torch.full(nearest.shape, math.inf, dtype=nodes.dtype, device=nodes.device)
    inner = nearest[..., 1:] - nearest[..., :-1] > 1.5
    for level in (nearest[..., :-1], nearest[..., 1:]):
        gap = middle - level * s
        slope = gap.abs().clamp_(min=1e-300).log_().mul_(p - 1).exp_().copysign_(gap).masked_fill_(inner, 0)
        value = slope * gap
        rise = slope.mul_(half * p)
        torch.minimum(lines[..., :-1], value - rise, out=lines[..., :-1])
        torch.minimum(lines[..., 1:], value.add_(rise), out=lines[..., 1:])
    return lines
