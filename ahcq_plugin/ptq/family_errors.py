# SPDX-License-Identifier: Apache-2.0
"""What every quantizer family would lose, tensor by tensor, after activation functions and after softmax."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq.batches import Forward, default_forward, model_device, to_device
from ahcq_plugin.ptq.calibrate import intercepted
from ahcq_plugin.ptq.paper_figures import named_quantizers, save_figure
from ahcq_plugin.ptq.prepare import prepare
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.ptq.score import ProductRunner
from ahcq_plugin.quantizers import (
    AGQFakeQuantize,
    FakeQuantize,
    HLUQFakeQuantize,
    LNQFakeQuantize,
    PowerOfTwoFakeQuantize,
    SearchObserver,
    UniformFakeQuantize,
)
from ahcq_plugin.quantizers.hluq import SEARCHED_RANGES
from ahcq_plugin.quantizers.search import spread_rows

TITLES = {"post_act": "(a) after GELU and ReLU", "softmax": "(b) after softmax"}
#: role -> label -> error of each place, in the model's order.
Errors = dict[str, dict[str, list[float]]]


class Contest:
    """Quantizers of all families that fit one place, judged by the squared error of the product behind it."""

    def __init__(self, role: str, bits: int):
        options: dict[str, Any] = dict(observer=SearchObserver, quant_max=2**bits - 1)
        self._uniform = UniformFakeQuantize(**options)
        self._hluq = HLUQFakeQuantize(search_range=True, **options)
        self._others = {"power of two": PowerOfTwoFakeQuantize(**options)}
        if role == "softmax":
            self._others |= {"AGQ": AGQFakeQuantize(**options), "LNQ": LNQFakeQuantize(**options)}
        self._signal = 0.0
        for quantizer in self._all():
            quantizer.output_error_power = 2

    def _all(self) -> list[FakeQuantize]:
        return [self._uniform, self._hluq, *self._others.values()]

    def observe(self, x: Tensor) -> None:
        """First pass."""
        for quantizer in self._all():
            quantizer.observe(x)

    def begin(self) -> None:
        """Between the passes."""
        for quantizer in self._all():
            quantizer.begin_search()

    def score(self, x: Tensor, product: Any) -> None:
        """Second pass; arguments of ``FakeQuantize.score``."""
        if x.numel():
            self._signal += float(product(spread_rows(x)).double().square().mean())
        for quantizer in self._all():
            quantizer.score(x, product)

    def errors(self) -> dict[str, float]:
        """label -> squared error of the product by its squared size. Without "searched": on the range from the mean
        minimum to the mean maximum, which comes first among the candidates."""

        def least(quantizer: FakeQuantize, ranges: int = 1) -> float:
            found = quantizer.activation_post_process.scores.errors
            return float(found[: len(found) // ranges].min()) / max(self._signal, 1e-300)

        uniform = self._uniform.activation_post_process.scores.errors
        return {
            "uniform": least(self._uniform, len(uniform)),
            "uniform, searched range": least(self._uniform),
            **{label: least(quantizer) for label, quantizer in self._others.items()},
            "HLUQ": least(self._hluq, len(SEARCHED_RANGES)),
            "HLUQ, searched range": least(self._hluq),
        }


@torch.no_grad()
def family_errors(model: nn.Module, batches: Sequence[Any], forward: Forward | None = None, bits: int = 4) -> Errors:
    """Relative squared error of the product behind every tensor of the roles ``post_act`` and ``softmax``, one tensor
    quantized at a time, everything else in floating point.

    Args:
        model: floating point; prepared in place. batches, forward: as for ``calibrate``.
    """
    forward = forward or default_forward
    prepare(model, Recipe.from_config("rtn", w_bits=bits, a_bits=bits))
    contests = {q: Contest(q.role, bits) for q, _ in named_quantizers(model) if q.role in TITLES}
    hooks = [q.register_forward_pre_hook(lambda _, x, c=c: c.observe(x[0])) for q, c in contests.items()]
    for batch in batches:
        forward(model, to_device(batch, model_device(model)))
    for hook in hooks:
        hook.remove()
    units = prepared_units(model)
    runners = {name: ProductRunner(unit, contests) for name, unit in units.items()}
    for quantizer, contest in contests.items():
        contest.begin()
        quantizer.score = contest.score
    with intercepted(units, lambda name, _, args, kwargs: runners[name](*args, **kwargs)):
        for batch in batches:
            forward(model, to_device(batch, model_device(model)))
    found: Errors = {role: {} for role in TITLES}
    for quantizer, contest in contests.items():
        del quantizer.score
        for label, error in contest.errors().items():
            found[quantizer.role].setdefault(label, []).append(error)
    return found


def draw_families(
    model: nn.Module, batches: Sequence[Any], folder: str | Path, bits: int = 4, forward: Forward | None = None
) -> dict[str, float]:
    """Write ``families.png``, the errors of ``family_errors``.

    Returns: "role, label" -> geometric mean over the places of the error, by that of "uniform".
    """
    errors = family_errors(model, batches, forward, bits)
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (role, rows) in zip(figure.subplots(1, 2), errors.items(), strict=True):
        _draw(axes, TITLES[role], rows)
    save_figure(figure, Path(folder) / "families.png")
    return {
        f"{role}, {label}": statistics.geometric_mean(
            max(e, 1e-12) / max(u, 1e-12) for e, u in zip(values, rows["uniform"], strict=True)
        )
        for role, rows in errors.items()
        for label, values in rows.items()
    }


def _draw(axes: Axes, title: str, rows: Mapping[str, Sequence[float]]) -> None:
    for label, values in rows.items():
        axes.plot(values, "o-", markersize=3, linewidth=0.7, label=label)
    axes.set(yscale="log", title=title, xlabel="place", ylabel="squared error of the product / its size")
    axes.legend(fontsize=7)
