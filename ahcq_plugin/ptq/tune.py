# SPDX-License-Identifier: Apache-2.0
"""Tuning through the output: a frozen model learns to give what it gave in floating point.

Reconstruction looks at one unit at a time; what it leaves adds up, and not all of it matters to a mask. Here the whole
quantized model runs, and activation scales, biases and the scales and shifts of norms learn by the error of what the
model returns. Hardware has all of them already. Weights stay on their grids; where a recipe says so they learn as well,
by straight-through rounding, and end on the same grids with other codes. Where a recipe names the units that
learn (a decoder, say), what does not depend on them runs once for an item.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from ahcq_plugin.ptq.loss import model_error
from ahcq_plugin.ptq.optimise import gradients, seeded, small_steps
from ahcq_plugin.ptq.prepared import (
    activation_quantizers,
    original_weights,
    set_quantization,
    training_only,
    weight_layers,
)
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.ptq.replay import Replay, chosen_units
from ahcq_plugin.ptq.resume import ResumeError, fingerprint, fitting, read_kept
from ahcq_plugin.quantizers.layers import read_parameters
from ahcq_plugin.support.batches import (
    Forward,
    blaming,
    check_batches,
    default_forward,
    model_device,
    naming_item,
    to_device,
)
from ahcq_plugin.support.checked import save_checked
from ahcq_plugin.support.given import check_function
from ahcq_plugin.support.workers import ALONE, Workers

TUNED_FILE = "tuned.pt"
FEATURES_FILE = "tuned_features.pt"
#: Steps between two states that are kept on disk.
KEPT_EVERY = 25
#: Items whose mean loss is reported: of thousands it would take as long as the steps.
MEASURED = 128
_KEPT = {"fingerprint": str, "done": int, "seconds": float, "parameters": list, "optimizer": dict}

#: ``loss(output, floating-point output)`` of the model on one item -> scalar.
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class TuneReport:
    """What tuning did.

    Attributes:
        loss_before, loss_after: mean over the first ``MEASURED`` items.
        values: how many numbers were tuned.
        seconds: of the steps (of all runs, when resumed).
    """

    steps: int
    loss_before: float
    loss_after: float
    values: int
    seconds: float


@torch.no_grad()
def floating_outputs(
    model: nn.Module, batches: Sequence[Any], forward: Forward | None = None, progress: bool = True
) -> list[Any]:
    """The floating-point outputs of a prepared model for every item, on the CPU: the targets of ``tune``.

    To be called before ``reconstruct``, which gives the floating-point weights up and takes hours.

    Raises:
        ValueError: gradients do not reach what ``tune`` would tune, since ``forward`` switches them off.
    """
    check_batches(batches)
    forward, device = forward or default_forward, model_device(model)
    set_quantization(model, False)
    with original_weights(model):
        _check_gradients(model, lambda item: forward(model, to_device(batches[item], device)), device)
        items = tqdm(batches, desc="floating-point outputs", unit="item", disable=not progress)
        targets = []
        for index, batch in enumerate(items):
            with naming_item(f"batches[{index}]"):
                targets.append(to_device(forward(model, to_device(batch, device)), "cpu"))
        return targets


def check_loss(loss: Loss, target: Any) -> None:
    """Raise TypeError or ValueError unless ``loss`` gives a scalar that gradients reach, as it does of ``target`` and
    itself; before ``reconstruct``, which takes hours."""
    check_function(loss, "loss")
    floating = (torch.Tensor, lambda t: t.detach().clone().requires_grad_(t.is_floating_point()))
    with torch.enable_grad(), blaming("`loss` fails on two equal outputs of the model"):
        value = loss(pytree.tree_map_only(*floating, target), target)
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"`loss` must return a tensor of one number, got {found}")
    if not value.requires_grad or not bool(torch.isfinite(value)):
        raise ValueError(f"`loss` must return a finite number that gradients reach, got {value!r:.80}")


def tune(
    model: nn.Module,
    batches: Sequence[Any],
    targets: Sequence[Any],
    recipe: Recipe,
    forward: Forward | None = None,
    loss: Loss | None = None,
    work_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    workers: Workers = ALONE,
    kept: str = TUNED_FILE,
) -> TuneReport:
    """Tune a frozen model for ``recipe.tune_steps`` steps, in place; it stays frozen.

    Tuned are, of the units that ``recipe.tune_units`` names, the learned scales of activation quantizers and what has
    one dimension: biases and the scales and shifts of norms; with ``recipe.tune_weight_lr`` codes of weights too, on
    the scales that they have. With ``work_dir`` the state is kept every ``KEPT_EVERY``
    steps in ``work_dir/kept``; with ``resume`` it goes on from there, and the result equals that of an
    uninterrupted run.

    Args:
        targets: ``floating_outputs`` of the same items.
        loss: of an item, to be differentiated; default ``model_error``.
        workers: processes that share each step's ``batch_size`` items.
        kept: name of the state's file.
    Raises:
        ResumeError: ``resume`` finds the state of another model, other data or another recipe.
    """
    check_batches(batches)
    if len(targets) != len(batches):
        raise ValueError(f"`targets` must be the {len(batches)} outputs of `floating_outputs`, got {len(targets)}")
    if resume and work_dir is None:
        raise ValueError("`resume=True` needs `work_dir`, the folder of the interrupted run")
    forward, device = forward or default_forward, model_device(model)
    path = None if work_dir is None else Path(work_dir) / kept
    mark = "" if path is None else fingerprint(model, batches, recipe, tuned=True)
    caches = None if path is None else path.parent / "unit_caches"
    tuned = set(chosen_units(model, recipe.tune_units))
    run = Replay(
        model, tuned, lambda i: forward(model, to_device(batches[i], device)), device, recipe.cache_device, caches
    )
    error = _ItemError(run, targets, loss or model_error, device)
    tuner = Tuner(model, recipe, error, workers)
    with run.running():
        seconds, before = 0.0, error.mean()
        if path is not None and workers.first(resume and path.exists()):
            seconds = tuner.load(path, mark)
        elif path is not None and workers.is_first:
            path.unlink(missing_ok=True)
        start = time.perf_counter() - seconds
        steps = tqdm(range(tuner.done, recipe.tune_steps), desc="tune", unit="it", disable=not progress)
        with training_only(model, tuner.parameters), torch.enable_grad():
            for number in steps:
                value = tuner.step()
                if number % 10 == 0:
                    steps.set_postfix(loss=f"{float(value):.4g}", refresh=False)
                if path is not None and workers.is_first and tuner.done % KEPT_EVERY == 0:
                    tuner.save(path, mark, time.perf_counter() - start)
        seconds = time.perf_counter() - start
        workers.copy(tuner.parameters)
        if path is not None and workers.is_first:
            tuner.save(path, mark, seconds)
        tuner.round_weights()
        values = sum(parameter.numel() for parameter in tuner.parameters)
        return TuneReport(recipe.tune_steps, before, error.mean(), values, seconds)


@dataclass(frozen=True)
class _ItemError:
    """The loss of the model's output on an item."""

    run: Callable[[int], Any]
    targets: Sequence[Any]
    loss: Loss
    device: torch.device

    def __call__(self, item: int) -> Tensor:
        return self.loss(self.run(item), to_device(self.targets[item], self.device))

    @torch.no_grad()
    def mean(self) -> float:
        """Over the first ``MEASURED`` items."""
        items = range(min(len(self.targets), MEASURED))
        return float(torch.stack([self(item) for item in items]).double().mean())


class Tuner:
    """Adam on what is tuned, step by step; learning rates follow a cosine to 0.

    Attributes:
        parameters: what is tuned; the first ``len(scales)`` are activation scales.
        done: number of steps done.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, error: _ItemError, workers: Workers):
        self._recipe, self._error, self._workers = recipe, error, workers
        units = chosen_units(model, recipe.tune_units)
        learned = [q for unit in units.values() for _, q in activation_quantizers(unit) if q.learnable_scales()]
        self._quantizers = list(dict.fromkeys(learned))
        self._scales = [scale for q in self._quantizers for scale in q.learnable_scales()]
        scales = set(self._scales)
        others = [parameter for parameter in _vectors(units) if parameter not in scales]
        rates = [(self._scales, recipe.tune_scale_lr), (others, recipe.tune_lr)]
        self._layers = [layer for unit in units.values() for layer in weight_layers(unit).values()]
        if recipe.tune_weight_lr:
            steps: dict[nn.Parameter, list[Tensor]] = defaultdict(list)
            for layer in self._layers:
                steps[read_parameters(layer)[0]].append(layer.weight_fake_quant.scale.mean())
            rates += [([w], recipe.tune_weight_lr * float(torch.stack(parts).mean())) for w, parts in steps.items()]
        self.parameters, self.done = [parameter for group, _ in rates for parameter in group], 0
        self._rates = [rate for group, rate in rates if group]
        groups = [{"params": group, "lr": rate} for group, rate in rates if group]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))

    def step(self) -> Tensor:
        """One step on ``recipe.batch_size`` items; returns their mean loss, a scalar."""
        recipe, workers, start = self._recipe, self._workers, self.done * self._recipe.batch_size
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self._error.device)
        for place in workers.share(recipe.batch_size):
            share = self._error(self._item(start + place)) / recipe.batch_size
            share.backward()
            total += share.detach()
        workers.add([*gradients(self.parameters, workers), total])
        factor = 0.5 + 0.5 * math.cos(math.pi * self.done / recipe.tune_steps)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        with small_steps(self._scales):
            self._optimizer.step()
        for quantizer in self._quantizers:
            quantizer.keep_valid()
        self.done += 1
        return total

    @torch.no_grad()
    def round_weights(self) -> None:
        """Put the weights back on their grids."""
        for layer in self._layers if self._recipe.tune_weight_lr else ():
            layer.weight.copy_(layer.weight_fake_quant.get_hard_value(layer.weight))

    def _item(self, number: int) -> int:
        """The ``number``-th item to learn from: all in random order, then all in another one."""
        count = len(self._error.targets)
        with seeded(self._recipe.seed, f"tune/{number // count}", torch.device("cpu")):
            return int(torch.randperm(count)[number % count])

    def save(self, path: Path, mark: str, seconds: float) -> None:
        """Keep the state; ``mark`` is the ``fingerprint`` of the run."""
        content = {
            "fingerprint": mark,
            "done": self.done,
            "seconds": seconds,
            "parameters": [parameter.detach().cpu() for parameter in self.parameters],
            "optimizer": to_device(self._optimizer.state_dict()["state"], "cpu"),
        }
        save_checked(content, path)

    @torch.no_grad()
    def load(self, path: Path, mark: str) -> float:
        """Go on from a kept state; returns the seconds that it took."""
        saved = read_kept(path, _KEPT)
        if saved["fingerprint"] != mark:
            raise ResumeError(
                f"cannot resume from {path}: it was made with another model, other calibration data or another recipe; "
                "remove it to tune anew, or use a new work dir"
            )
        with fitting(path):
            for parameter, value in zip(self.parameters, saved["parameters"], strict=True):
                parameter.copy_(value)
            self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": saved["optimizer"]})
        self.done = saved["done"]
        return saved["seconds"]


def _vectors(units: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """What units read that has one dimension, each once."""
    read = dict.fromkeys(p for unit in units.values() for p in read_parameters(unit))
    return [parameter for parameter in read if parameter.ndim == 1]


def _check_gradients(model: nn.Module, run: Callable[[int], Any], device: torch.device) -> None:
    units = chosen_units(model, ())
    replay, learning = Replay(model, set(units), run, device), _vectors(units)
    with replay.running(), training_only(model, learning), torch.enable_grad():
        leaves = pytree.tree_leaves(replay(0))
    if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
        raise ValueError(
            "tuning needs gradients, and none come through the model's forward: it runs under `torch.no_grad` or "
            "detaches its output; give a `forward` that does not, or set the recipe's `tune_steps` to 0"
        )
