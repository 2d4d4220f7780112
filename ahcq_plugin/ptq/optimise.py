# SPDX-License-Identifier: Apache-2.0
"""The optimisation of one module (a unit, or a layer in it): AdaRound + learned scales + QDrop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ahcq_plugin.functional.adaround import rounding_regularizer
from ahcq_plugin.functional.dropping import Drop
from ahcq_plugin.ptq.channels import channel_axes
from ahcq_plugin.ptq.freeze import harden
from ahcq_plugin.ptq.loss import output_error, rounding_exponent
from ahcq_plugin.ptq.prepared import activation_quantizers, set_quantization, training_only, weight_layers
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.quantizers import FakeQuantize
from ahcq_plugin.quantizers.base import MILESTONES
from ahcq_plugin.quantizers.layers import read_parameters
from ahcq_plugin.support.workers import ALONE, Workers

#: Most that a scale may change in a step, as a share of itself. Adam moves by about its learning rate whatever the
#: gradient; scales of 8-bit attention probabilities are near 0.002, and steps that suit others would wipe them out.
MAX_RELATIVE_STEP = 0.02


@contextmanager
def seeded(seed: int, name: str, device: torch.device) -> Iterator[None]:
    """Random numbers of the CPU and ``device`` that depend on (seed, name) alone, so that a resumed run draws what an
    uninterrupted one draws; those of other devices are left alone, afterwards all go on as if nothing had happened."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(number)  # torch.manual_seed would seed every GPU, and one is restored
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(number)
        yield


def mix(quantized: Any, floating: Any, share: float) -> Any:
    """Element-wise random mixture: ``share`` of the elements from ``quantized``, the rest from ``floating``."""

    def pick(q: Any, f: Any) -> Any:
        drop = Drop.draw(q, share) if isinstance(q, Tensor) and q.is_floating_point() else None
        return q if drop is None else drop.apply(f, q)

    return pytree.tree_map(pick, quantized, floating)


@contextmanager
def small_steps(scales: Sequence[Tensor]) -> Iterator[None]:
    """What is done to ``scales`` within the context moves no element by more than ``MAX_RELATIVE_STEP`` of itself, so
    that positive ones stay positive."""
    before = [scale.detach().clone() for scale in scales]
    yield
    with torch.no_grad():
        for scale, old in zip(scales, before, strict=True):
            bound = old * MAX_RELATIVE_STEP
            scale.clamp_(old - bound, old + bound)


class ScaleLearner:
    """Adam with a cosine schedule on the scales of activation quantizers.

    Each element moves by at most ``MAX_RELATIVE_STEP`` of itself a step, so scales stay positive. Where a quantizer
    replaces its scale at a milestone, the new parameter starts without moments and the schedule goes on.
    """

    def __init__(self, quantizers: Sequence[FakeQuantize], learning_rate: float, iterations: int):
        self._quantizers = [q for q in quantizers if q.learnable_scales()]
        self._iterations, self._done = iterations, 0
        self._optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate) if self._quantizers else None
        self._schedule = (
            torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, T_max=iterations) if self._quantizers else None
        )

    def parameters(self) -> list[nn.Parameter]:
        """The scales as they are now."""
        return [s.requires_grad_() for q in self._quantizers for s in q.learnable_scales()]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for scale in self.parameters():
            scale.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One step of every scale, then the milestones that it passed."""
        if self._optimizer is None:
            return
        with small_steps(self.parameters()):
            self._optimizer.step()
        self._schedule.step()
        for quantizer in self._quantizers:
            quantizer.keep_valid()
        self._done += 1
        for share in MILESTONES:
            if self._done == int(share * self._iterations):
                self._pass_milestone(share)

    def _pass_milestone(self, share: float) -> None:
        changed = [quantizer.milestone(share) for quantizer in self._quantizers]
        if any(changed):
            kept = self.parameters()
            for gone in set(self._optimizer.state) - set(kept):
                del self._optimizer.state[gone]
            self._optimizer.param_groups[0]["params"] = kept


def gradients(parameters: Sequence[nn.Parameter], workers: Workers) -> list[Tensor]:
    """Gradients to add up over ``workers``: zeros where this process had no item, or the items did not reach it."""
    if workers.size > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@dataclass(frozen=True)
class Samples:
    """What a module learns from: calls of it, by their number.

    Attributes:
        count: of the calls.
        inputs: ``inputs("quantized" | "floating", sample)`` gives (args, kwargs) of the call.
        error: ``error(output, sample)`` gives what is minimised, a scalar.
    """

    count: int
    inputs: Callable[[str, int], tuple[tuple, dict]]
    error: Callable[[Any, int], Tensor]

    @classmethod
    def of_outputs(
        cls,
        module: nn.Module,
        count: int,
        inputs: Callable[[str, int], tuple[tuple, dict]],
        target: Callable[[int], Any],
    ) -> Samples:
        """The error is that of the module's output; ``target(sample)`` gives the floating-point one."""
        axes = channel_axes(module, *inputs("floating", 0))
        return cls(count, inputs, lambda out, sample: output_error(out, target(sample), axes))


class Learner:
    """Learns the rounding of all weights in a module, and activation scales if the recipe does, step by step.

    Args:
        name: of the module; random numbers depend on it.
    """

    def __init__(self, module: nn.Module, name: str, samples: Samples, recipe: Recipe, workers: Workers):
        self._module, self._name, self._samples = module, name, samples
        self._recipe, self._workers = recipe, workers
        self._device = read_parameters(module)[0].device
        self._alphas = []
        for layer in weight_layers(module).values():
            layer.weight_fake_quant.init(layer.weight)
            self._alphas.append(layer.weight_fake_quant.alpha)
        self._rounding = torch.optim.Adam(self._alphas, lr=recipe.rounding_lr)
        learned = [q for _, q in activation_quantizers(module)] if recipe.learn_scales else []
        self._scales = ScaleLearner(learned, recipe.scale_lr, recipe.iterations)

    def step(self, number: int) -> Tensor:
        """Step ``number``, from 0: the error of ``recipe.batch_size`` drawn samples goes down; returns it, a scalar."""
        self._rounding.zero_grad(set_to_none=True)
        self._scales.zero_grad()
        error = torch.zeros((), device=self._device)
        batch_size = self._recipe.batch_size
        chosen = self._workers.first(torch.randint(self._samples.count, (batch_size,)).tolist())
        for place in self._workers.share(batch_size):
            # the first sample's numbers go on from step to step, each other sample has its own
            own = seeded(self._recipe.seed, f"{self._name}/{number}/{place}", self._device) if place else nullcontext()
            with own:
                share = self._error(chosen[place]) / batch_size
                share.backward()
            error += share.detach()
        learned = [*self._alphas, *self._scales.parameters()]
        self._workers.add([*gradients(learned, self._workers), error])
        self._decide_roundings(number)
        self._rounding.step()
        self._scales.step()
        return error

    def _error(self, sample: int) -> Tensor:
        inputs = self._samples.inputs
        args, kwargs = mix(inputs("quantized", sample), inputs("floating", sample), self._recipe.input_mix)
        return self._samples.error(self._module(*args, **kwargs), sample)

    def _decide_roundings(self, number: int) -> None:
        """Add the gradient of the regulariser, which draws every rounding to up or down."""
        r = self._recipe
        exponent = rounding_exponent(number, r.iterations, r.warmup, r.exponent_start, r.exponent_end)
        if exponent is not None:
            penalty = r.rounding_weight * sum(rounding_regularizer(alpha, exponent) for alpha in self._alphas)
            penalty.backward()


@contextmanager
def _learning(module: nn.Module, keep_probability: float) -> Iterator[None]:
    """Within the context, no parameter that is there is trained and activations are in drop mode."""
    activations = [quantizer for _, quantizer in activation_quantizers(module)]
    with training_only(module, ()):
        try:
            for quantizer in activations:
                quantizer.prob = keep_probability
            yield
        finally:
            for quantizer in activations:
                quantizer.prob = 1.0


def optimise(
    module: nn.Module,
    name: str,
    samples: Samples,
    recipe: Recipe,
    on_step: Callable[[Tensor], None],
    workers: Workers = ALONE,
) -> None:
    """Learn the rounding of all weights in ``module`` (and activation scales, if the recipe does), then hard-round.

    Args:
        module: has fake quantizers; may itself be a quantized layer.
        name: random numbers depend on it and the recipe's seed alone.
        samples: each step draws ``recipe.batch_size`` of them.
        on_step: called with the reconstruction error, a scalar, after every iteration; reading it waits for the device.
        workers: processes that share the items of a step and add up their gradients. Random numbers depend on an item's
            place in its step, so with as many items a step as processes, or one, their number changes nothing; else
            the order of additions does, in last bits.
    """
    set_quantization(module, True, recipe.quantize_activations)
    device = read_parameters(module)[0].device
    with _learning(module, recipe.keep_probability):
        learner = Learner(module, name, samples, recipe, workers)
        with seeded(recipe.seed, name, device), torch.enable_grad():
            for number in range(recipe.iterations):
                on_step(learner.step(number))
        harden(module)
