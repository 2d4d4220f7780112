# SPDX-License-Identifier: Apache-2.0
"""What quantizers share whose parameters are chosen among candidates, by output error."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ahcq_plugin.quantizers.sampling import spread_rows
from ahcq_plugin.quantizers.scores import Scores

OWN_ERROR_POWER = 2.4


class OutputErrorSearch:
    """Chooses a fake quantizer's parameters among candidates; its observer must be an ``OutputErrorObserver``.

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
        observer.scores = self._scores(self.output_error_power) if observer.calls else None
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


def geometric(first: float, last: float, count: int) -> list[float]:
    """``count`` numbers from ``first`` to ``last`` with equal ratios."""
    return [first * (last / first) ** (k / (count - 1)) for k in range(count)]
