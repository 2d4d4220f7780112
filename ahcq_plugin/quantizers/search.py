# SPDX-License-Identifier: Apache-2.0
"""What quantizers with searched parameters share: observer, scores of candidates, the choice among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ahcq_plugin.quantizers.observers import AvgMinMaxObserver

MIN_SCALE = torch.finfo(torch.float32).eps
SCORED_ELEMENTS = 2**16
SCORED_OUTPUTS = 2**19
SAMPLED_PER_CALL = 2**12
SAMPLED = 2**16
OWN_ERROR_POWER = 2.4


class SearchObserver(AvgMinMaxObserver):
    """Mean over calls of the minimum and of the maximum, the largest value, and a sample of the values.

    The sample takes evenly strided values of every call, at most ``SAMPLED_PER_CALL``. When it exceeds ``SAMPLED``, it
    is halved, and so is what later calls give. It and ``scores`` serve calibration only and are not in the state dict.
    """

    def __init__(self, quant_min: int = 0, quant_max: int = 255, ch_axis: int = -1):
        super().__init__(quant_min, quant_max, ch_axis)
        self.register_buffer("largest", torch.zeros(1))
        self.register_buffer("sample", torch.zeros(0), persistent=False)
        self.per_call = SAMPLED_PER_CALL
        self.scores: Scores | None = None

    def reset(self) -> None:
        super().reset()
        self.largest = torch.zeros_like(self.largest)
        self.sample = self.sample.new_zeros(0)
        self.per_call, self.scores = SAMPLED_PER_CALL, None

    def summary(self, x: Tensor, ahead: bool = False) -> tuple:
        values = x.reshape(-1)
        rates = halvings(SAMPLED_PER_CALL) if ahead else (self.per_call,)
        samples = {rate: strided(values, rate).float() for rate in rates}
        return *super().summary(x), values.amax().float().view(1), samples

    def absorb(self, summary: tuple) -> None:
        *extremes, highest, samples = summary
        self.largest = torch.maximum(self.largest, highest) if int(self.count) else highest
        self.sample = torch.cat([self.sample.to(highest.device), samples[self.per_call]])
        if len(self.sample) > SAMPLED:
            self.sample, self.per_call = self.sample[::2].clone(), max(self.per_call // 2, 1)
        super().absorb(tuple(extremes))

    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean minimum, mean maximum and largest value, each (1,) float32.

        Raises:
            RuntimeError: nothing was observed, or values that are not finite.
        """
        if not int(self.count):
            raise RuntimeError("the observer has seen no data: run `calibrate` with at least one batch that reaches it")
        found = self.min_val, self.max_val, self.largest
        if not bool(torch.isfinite(torch.cat(found)).all()):
            raise RuntimeError(
                f"the observed range must be finite, got [{float(self.min_val)}, {float(self.max_val)}]: look for "
                "NaN or overflow in the floating-point model"
            )
        return found


class Scores:
    """Sums over items of each candidate's error, in float64.

    Args:
        candidates: parameters to choose from.
        quantize: ``quantize(x, candidate)`` gives x_hat in x's dtype.
        power: the error of an item is mean |product(x_hat) - product(x)|^power.
    """

    def __init__(self, candidates: Sequence[Any], quantize: Callable[[Tensor, Any], Tensor], power: float):
        self.candidates, self.quantize, self.power = list(candidates), quantize, power
        self.errors: Tensor | None = None

    def add(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> None:
        """Add one item; an empty one adds nothing."""
        if x.numel():
            self.add_errors(self.judge(x, product))

    @torch.no_grad()
    def judge(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """Every candidate's error on an item that is not empty, float64 (candidates,).

        Where the product is much larger than x (a query times all keys) fewer rows are judged.
        """
        wanted = product(x)
        if wanted.numel() > SCORED_OUTPUTS:
            x = spread_rows(x, x.numel() * SCORED_OUTPUTS // wanted.numel())
            wanted = product(x)
        wanted, errors = wanted.double(), []
        for candidate in self.candidates:
            error = product(self.quantize(x, candidate)).double().sub_(wanted).abs_()
            # exp(p log e) is several times faster than pow on a CPU, and 0 stays 0
            errors.append((error.square_() if self.power == 2 else error.log_().mul_(self.power).exp_()).mean())
        # a candidate whose product overflows half precision has lost
        return torch.stack(errors).nan_to_num_(nan=math.inf)

    def add_errors(self, errors: Tensor) -> None:
        """Add what ``judge`` gave."""
        self.errors = errors if self.errors is None else self.errors.to(errors.device) + errors

    def best(self) -> Any:
        """The candidate of the least error, the first of equal ones."""
        return self.candidates[int(torch.argmin(self.errors))]


def halvings(rate: int) -> list[int]:
    """rate, rate // 2, ... 1: how many values a call may be asked for."""
    return [rate >> k for k in range(rate.bit_length())]


def strided(values: Tensor, most: int) -> Tensor:
    """At most ``most`` of ``values`` along the first axis, evenly strided."""
    return values[:: coprime_step(len(values), -(-len(values) // most))]


def coprime_step(length: int, least: int) -> int:
    """The first number from ``least`` on without common divisor with ``length``: a stride that no period hides from."""
    step = max(least, 1)
    while math.gcd(step, length) > 1:
        step += 1
    return step


def spread_rows(x: Tensor, most: int = SCORED_ELEMENTS) -> Tensor:
    """Evenly spread rows ``x[..., rows, :]`` of at most ``most`` elements in all, but at least one row."""
    if x.ndim < 2 or x.numel() <= most:
        return x
    length = x.shape[-2]
    count = max(1, most // (x.numel() // length))
    if count >= length:
        return x
    rows = (torch.arange(count, device=x.device) * coprime_step(length, length // count) + length // 2) % length
    return x.index_select(-2, rows.sort().values)


class OutputErrorSearch:
    """Chooses a fake quantizer's parameters among candidates; its observer must be a ``SearchObserver``.

    With a second calibration pass the candidate with the least error of the product behind the tensor wins, without one
    the candidate with the least mean |x_hat - x|^2.4 on the observer's sample. A subclass names its functional module
    and implements ``candidates`` and ``take``.
    """

    functional: ModuleType
    output_error_power = 2.4

    def candidates(self) -> list[Any]:
        """Parameters to choose from, made from the observer's statistics."""
        raise NotImplementedError

    def take(self, params: Any) -> None:
        """Make ``params`` the current parameters."""
        raise NotImplementedError

    def _scores(self, power: float) -> Scores:
        return Scores(self.candidates(), lambda x, params: self.functional.fake_quantize(x, params, self.bits), power)

    def begin_search(self) -> bool:
        observer = self.activation_post_process
        observer.scores = self._scores(self.output_error_power) if int(observer.count) else None
        return observer.scores is not None

    def judge(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        scores = self.activation_post_process.scores
        if scores is None:
            raise RuntimeError("`score` was called without `begin_search`: calibrate in two passes")
        return scores.judge(spread_rows(x.detach()), product)

    def add_errors(self, errors: Tensor) -> None:
        self.activation_post_process.scores.add_errors(errors)

    @torch.no_grad()
    def commit(self) -> None:
        observer = self.activation_post_process
        scores = observer.scores
        if scores is None or scores.errors is None:
            scores = self._scores(OWN_ERROR_POWER)
            scores.add(observer.sample, lambda x: x)
            if scores.errors is None:
                raise RuntimeError("the observer keeps no sample (it is not in the state dict): run `calibrate` again")
        self.take(scores.best())
        observer.scores = None
        self.keep_valid()

    def check_tensor_wide(self) -> None:
        """ValueError if ``ch_axis`` asks for parameters per channel."""
        if self.ch_axis != -1:
            raise ValueError(
                f"the search of family {self.family} is per tensor: `ch_axis` must be -1, got {self.ch_axis!r}"
            )


class LearnedScaleMixin:
    """For quantizers whose ``scale`` is a parameter that reconstruction learns."""

    scale: nn.Parameter

    def learnable_scales(self) -> list[nn.Parameter]:
        """The scale."""
        return [self.scale]

    def keep_valid(self) -> None:
        """Scales of at least float32 eps."""
        # on the data: valid scales stay as they are, and so does a graph that has saved them
        self.scale.data.abs_().clamp_(min=MIN_SCALE)


def geometric(first: float, last: float, count: int) -> list[float]:
    """``count`` numbers from ``first`` to ``last`` with equal ratios."""
    return [first * (last / first) ** (k / (count - 1)) for k in range(count)]
