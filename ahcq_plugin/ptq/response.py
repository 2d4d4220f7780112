# SPDX-License-Identifier: Apache-2.0
"""Prompt-aware reconstruction (SAQ-SAM): units learn by how the floating-point decoder responds to prompts.

What an encoder gives is judged by what prompts make of it: image tokens of a stage of blocks skip all later blocks, go
through what stands between the encoder and the decoder, and through the decoder's transformer with the prompts of the
item. Of the decoder, each layer's own error is joined by that of the tokens that the transformer returns in the end.
Later units compute in floating point, with gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ahcq_plugin.ptq.optimise import Samples, seeded
from ahcq_plugin.ptq.prepared import StopForward, intercepted, original_weights, quantization_off, training_only
from ahcq_plugin.ptq.stages import Stages
from ahcq_plugin.ptq.stream import UnitStream

#: Prompts of an item that are used at most.
MOST_PROMPTS = 16
#: What of an item holds one row for each prompted object.
PROMPTS = ("boxes", "points", "labels", "masks")
#: Weight of the error of a decoder layer's prompt tokens beside that of its image tokens.
TOKEN_WEIGHT = 0.01


def few_prompts(batches: Sequence[Any], seed: int, most: int = MOST_PROMPTS) -> list[Any]:
    """The items with at most ``most`` of their prompts, drawn without replacement and left in their order.

    Items that are no mapping, or hold none of ``PROMPTS``, stay as they are.
    """
    fewer = []
    for number, item in enumerate(batches):
        given = [key for key in PROMPTS if isinstance(item, Mapping) and isinstance(item.get(key), Tensor)]
        count = len(item[given[0]]) if given else 0
        if count > most:
            with seeded(seed, f"prompts/{number}", torch.device("cpu")):
                rows = torch.randperm(count)[:most].sort().values
            item = {**item, **{key: item[key][rows.to(item[key].device)] for key in given}}
        fewer.append(item)
    return fewer


class Stage(nn.Module):
    """Units one behind the other, learned together."""

    def __init__(self, units: Sequence[nn.Module]):
        super().__init__()
        self.units = nn.ModuleList(units)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first, *others = self.units
        out = first(*args, **kwargs)
        for unit in others:
            out = unit(out)
        return out


@dataclass(frozen=True)
class Response:
    """How the rest of a model responds to what the units ``group`` give.

    Args:
        stages: of the model whose ``stream`` has collected the first unit of the group.
        module: the units as one module, to be learned.
    """

    stream: UnitStream
    stages: Stages
    group: tuple[str, ...]
    module: nn.Module

    @property
    def in_decoder(self) -> bool:
        """Whether the group is a layer of the decoder."""
        return self.group[0] in self.stages.decoder_units

    def floating(self, sample: int) -> Any:
        """Floating-point output of the group for one of the stream's samples."""
        if len(self.group) == 1:
            return self.stream.target(self.group[0], sample)
        args, kwargs = self.stream.inputs("floating", sample)
        with torch.no_grad(), original_weights(self.module), quantization_off(self.module):
            return self.module(*args, **kwargs)

    def respond(self, kind: str, sample: int, out: Any) -> Tensor:
        """What the decoder's transformer returns when the group gives ``out``: its image tokens, of a layer of the
        decoder its prompt tokens, (..., channels).

        Args:
            kind: of the earlier units that are still read, ``quantized`` or ``floating``.
        """
        item, _ = self.stream.samples[sample]
        order = self.stream.order
        earlier = set(order[: order.index(self.group[0])])
        skipped = self.stages.skipped_behind(self.group)

        def handler(name: str, unit_forward: Any, args: tuple, kwargs: dict) -> Any:
            if name == self.group[-1]:
                return out
            if name in self.group or name in skipped:
                return args[0]
            if name in earlier:
                return self.stream.stand_in(name, kind, item)
            return unit_forward(*args, **kwargs)

        responses: list[Any] = []

        def stop(module: nn.Module, args: Any, result: Any) -> None:
            responses.append(result)
            raise StopForward

        handle = self.stages.decoder.register_forward_hook(stop)
        try:
            with intercepted(self.stream.units, handler):
                self.stream.run(item)
        except StopForward:
            pass
        finally:
            handle.remove()
        tokens, image = by_size(responses[0])
        return tokens if self.in_decoder else image

    def samples(self, targets: Any) -> Samples:
        """The group's calls with their error; ``targets`` is an empty store for floating-point responses.

        Raises:
            ValueError: the model's forward lets no gradients through.
        """
        with torch.no_grad():
            for sample in range(len(self.stream.samples)):
                targets[sample] = self.respond("floating", sample, self.floating(sample))
        self._check_gradients()
        return Samples(len(self.stream.samples), self.stream.inputs, partial(self._error, targets))

    def _error(self, targets: Any, out: Any, sample: int) -> Tensor:
        response = self.respond("quantized", sample, out)
        error = squared(response, targets.get(sample, self.stream.device))
        if self.in_decoder:
            (tokens, image), (wanted, wanted_image) = by_size(out), by_size(self.stream.target(self.group[0], sample))
            error = error + TOKEN_WEIGHT * squared(tokens, wanted) + squared(image, wanted_image)
        return error

    def _check_gradients(self) -> None:
        with torch.enable_grad():
            out = pytree.tree_map(
                lambda t: t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t,
                self.floating(0),
            )
            reached = self.respond("quantized", 0, out).requires_grad
        if not reached:
            raise ValueError(
                "`par` needs gradients through the decoder, and the model's forward runs under `torch.no_grad` or "
                "detaches its tensors; give a `forward` that does not, or set the recipe's `par` to False"
            )

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Within the context, nothing of the model is trained but what the group's module itself learns, and later
        units have the weights that they came with."""
        order = self.stream.order
        later = nn.ModuleList(self.stream.units[name] for name in order[order.index(self.group[-1]) + 1 :])
        with training_only(self.stream.model, ()), original_weights(later):
            yield


def by_size(outputs: Any) -> tuple[Tensor, Tensor]:
    """(prompt tokens, image tokens) of what a decoder's transformer or layer returns: the fewest and the most values of
    its tensors of floats."""
    leaves = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    ordered = sorted(leaves, key=Tensor.numel)
    return ordered[0], ordered[-1]


def squared(out: Tensor, target: Tensor) -> Tensor:
    """Squared error, summed over the last axis, the channels, and averaged over the rest; 0 where there is nothing."""
    errors = (out.float() - target.float()).square().sum(-1)
    return errors.sum() / max(errors.numel(), 1)
