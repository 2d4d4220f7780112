# SPDX-License-Identifier: Apache-2.0
"""What every quantizer family would lose, tensor by tensor, after activation functions and after softmax."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from ahcq_plugin.ptq.calibrate import calibrate_activations
from ahcq_plugin.ptq.prepare import prepare, prepare_unit
from ahcq_plugin.ptq.prepared import activation_quantizers
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.quantizers import (
    ACTIVATION_FAMILIES,
    AGQFakeQuantize,
    AvgMinMaxObserver,
    FakeQuantize,
    HLUQFakeQuantize,
    LNQFakeQuantize,
    OutputErrorObserver,
    PowerOfTwoFakeQuantize,
    UniformFakeQuantize,
)
from ahcq_plugin.quantizers.hluq import SEARCHED_RANGES
from ahcq_plugin.quantizers.lnq import PUBLISHED_FACTORS
from ahcq_plugin.quantizers.sampling import spread_rows
from ahcq_plugin.quantizers.table import TableFakeQuantize
from ahcq_plugin.studies.paper_figures import save_figure
from ahcq_plugin.support.batches import Forward

TITLES = {"post_act": "(a) after GELU and ReLU", "softmax": "(b) after softmax"}
#: role -> label -> error of each place, in the model's order.
Errors = dict[str, dict[str, list[float]]]


class Contest(FakeQuantize):
    """Takes a quantizer's place during calibration and lets one of every family that fits there go through both passes,
    judged by the squared error of the product behind the tensor.

    Attributes:
        errors: label -> squared error of the product by its squared size; filled by ``commit``.
    """

    def __init__(self, quant_max: int = 255, role: str = ""):
        super().__init__(AvgMinMaxObserver, quant_max=quant_max, role=role)
        options: dict[str, Any] = dict(observer=OutputErrorObserver, quant_max=quant_max)
        # in a dict, so no modules of the model: calibration would treat those as quantizers of their own
        self.rivals: dict[str, UniformFakeQuantize | TableFakeQuantize] = {
            "uniform": UniformFakeQuantize(**options),
            "power of two": PowerOfTwoFakeQuantize(**options),
            "HLUQ": HLUQFakeQuantize(search_range=True, **options),
        }
        if role == "softmax":
            self.rivals |= {"AGQ": AGQFakeQuantize(**options), "LNQ": LNQFakeQuantize(**options)}
        for rival in self.rivals.values():
            rival.output_error_power = 2
        self.errors: dict[str, float] = {}
        self._signal = 0.0

    def observe(self, x: Tensor) -> None:
        for rival in self.rivals.values():
            rival.observe(x)

    def begin_search(self) -> bool:
        started = [rival.begin_search() for rival in self.rivals.values()]
        return all(started)

    def score(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> None:
        if x.numel():
            self._signal += float(product(spread_rows(x)).double().square().mean())
        for rival in self.rivals.values():
            rival.score(x, product)

    def commit(self) -> None:
        """Take the errors. The published candidates come first; what is ours besides has a label of its own."""
        scores = {label: rival.activation_post_process.scores for label, rival in self.rivals.items()}
        published = {"uniform": 1, "HLUQ": len(scores["HLUQ"].candidates) // len(SEARCHED_RANGES)}
        ours = {"uniform": "uniform, searched range", "HLUQ": "HLUQ, searched range", "LNQ": "LNQ, steeper tables"}
        if "LNQ" in scores:
            steepest = max(PUBLISHED_FACTORS)
            published["LNQ"] = sum(float(p.shape_factor) <= steepest for p in scores["LNQ"].candidates)
        for label, score in scores.items():
            self.errors[label] = float(score.errors[: published.get(label)].min()) / max(self._signal, 1e-300)
            if label in ours:
                self.errors[ours[label]] = float(score.errors.min()) / max(self._signal, 1e-300)


def family_errors(model: nn.Module, batches: Sequence[Any], forward: Forward | None = None, bits: int = 4) -> Errors:
    """Relative squared error of the product behind every tensor of the roles ``post_act`` and ``softmax``, one tensor
    quantized at a time, everything else in floating point.

    Args:
        model: floating point; prepared in place. batches, forward: as for ``calibrate``.
    """
    families = {**ACTIVATION_FAMILIES, "hluq": Contest, "lnq": Contest}
    recipe = Recipe.from_config("rtn", w_bits=bits, a_bits=bits, hluq=True, lnq=True)
    prepare(model, recipe, prepare_unit=partial(prepare_unit, families=families))
    calibrate_activations(model, batches, forward)
    errors: Errors = {role: {} for role in TITLES}
    for _, contest in activation_quantizers(model):
        if isinstance(contest, Contest):
            for label, error in contest.errors.items():
                errors[contest.role].setdefault(label, []).append(error)
    return errors


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
