# SPDX-License-Identifier: Apache-2.0
"""What every fake quantizer shares: modes, QDrop, state that resizes on load, learned scales.

The attribute names (``activation_post_process``, ``quant_min``, ``quant_max``, ``ch_axis``, ``bitwidth``, ``scale``,
``prob``, ``with_args``) are MQBench's, so that its loops drive our quantizers without this package importing it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase

from ahcq_plugin.functional.dropping import Drop
from ahcq_plugin.functional.uniform import check_bits
from ahcq_plugin.quantizers.host_value import HostValue

#: Shares of a reconstruction's iterations at which quantizers may change their form.
MILESTONES = (0.2, 0.4, 0.6, 0.8)
#: Learned scales are at least this.
MIN_SCALE = torch.finfo(torch.float32).eps
#: Buffers of a fake quantizer that hold its modes, one number each.
MODES = ("observer_enabled", "fake_quant_enabled", "drop_keep")


class ResizingStateMixin:
    """On load, tensors take the shape found in the state dict: it is known only after calibration."""

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        own = dict(self._buffers)
        own.update(self._parameters)
        for name, tensor in own.items():
            loaded = state_dict.get(prefix + name)
            if tensor is not None and loaded is not None and loaded.shape != tensor.shape:
                tensor.data = torch.empty_like(loaded, dtype=tensor.dtype, device=tensor.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class FakeQuantize(ResizingStateMixin, FakeQuantizeBase):
    """Base of all fake quantizers; a subclass implements ``encode``, ``decode``, ``quantize`` and ``commit``.

    Three modes live in buffers: observing, quantizing, and ``prob`` (QDrop: the share of elements that are quantized).
    A forward reads them from ``HostValue``, so that it does not wait for a GPU; whoever writes the buffers is followed.
    Calibration observes every item, then calls ``begin_search`` and, where that returns True, ``score`` once per item;
    ``commit`` ends it. Whoever only observes (MQBench) goes straight to ``commit``.

    Args:
        observer: class or factory, called with ``quant_min``, ``quant_max``, ``ch_axis`` and ``observer_kwargs``.
        quant_min, quant_max: code range; must be 0 and 2^bits - 1.
        ch_axis: channel axis of the parameters, -1 for one set of parameters per tensor.
        role: what the tensor is in its block (``qkv_in``, ``softmax``, ``weight``, ...); used in reports.
    """

    family = ""
    #: Of its state what nothing computes with once it is frozen: modes, and what calibration collects.
    calibration_state: tuple[str, ...] = (
        "observer_enabled",
        "fake_quant_enabled",
        "drop_keep",
        "activation_post_process",
    )
    #: The Linear and Conv2d layers fed by this quantizer; set by ``prepare``, not part of the state.
    consumers: tuple[nn.Module, ...] = ()

    def __init__(self, observer, quant_min=0, quant_max=255, ch_axis=-1, role="", **observer_kwargs):
        super().__init__()
        self._modes = {name: HostValue() for name in MODES}
        bits = int(quant_max).bit_length()
        if quant_min != 0 or quant_max != 2**bits - 1:
            raise ValueError(f"`quant_min`, `quant_max` must be 0 and 2^bits - 1, got {quant_min!r}, {quant_max!r}")
        self.bits = self.bitwidth = check_bits(bits)
        self.quant_min, self.quant_max, self.ch_axis, self.role = quant_min, quant_max, ch_axis, role
        self.activation_post_process = observer(
            quant_min=quant_min, quant_max=quant_max, ch_axis=ch_axis, **observer_kwargs
        )
        self.register_buffer("drop_keep", torch.tensor([1.0]))
        self.enable_observer(False)
        self.enable_fake_quant(False)
        self.prob = 1.0

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for value in self._modes.values():
            value.forget()

    def look(self) -> None:
        """Read the modes now: compiled code cannot."""
        for name, value in self._modes.items():
            value.read(getattr(self, name))

    @property
    def prob(self) -> float:
        """Probability that an element is quantized; below 1 only during reconstruction (QDrop)."""
        return self._modes["drop_keep"].read(self.drop_keep)

    @prob.setter
    def prob(self, value: float) -> None:
        stored = torch.tensor(value, dtype=self.drop_keep.dtype, device="cpu").item()
        self._modes["drop_keep"].note(self.drop_keep.fill_(value), stored)

    @property
    def observing(self) -> bool:
        """Whether forward records statistics."""
        return bool(self._modes["observer_enabled"].read(self.observer_enabled))

    @property
    def quantizing(self) -> bool:
        """Whether forward returns quantized values."""
        return bool(self._modes["fake_quant_enabled"].read(self.fake_quant_enabled))

    def enable_observer(self, enabled: bool = True) -> None:
        """Record statistics from now on, or not."""
        super().enable_observer(enabled)
        self._modes["observer_enabled"].note(self.observer_enabled, bool(enabled))

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Return quantized values from now on, or the input as it is."""
        super().enable_fake_quant(enabled)
        self._modes["fake_quant_enabled"].note(self.fake_quant_enabled, bool(enabled))

    def channel_axis(self, ndim: int) -> int | None:
        """Axis of an ``ndim``-dimensional tensor along which parameters differ; None: one set per tensor."""
        return None if self.ch_axis == -1 else self.ch_axis

    def encode(self, x: Tensor) -> Tensor:
        """int64 codes of x, in [0, 2^bits - 1]."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """float32 values of the codes."""
        raise NotImplementedError

    def quantize(self, x: Tensor, drop: Drop | None = None) -> Tensor:
        """``decode(encode(x))`` with straight-through gradients; with ``drop``, of the elements that it chooses."""
        raise NotImplementedError

    def observe(self, x: Tensor) -> None:
        """Record statistics of x."""
        self.activation_post_process(self.observed(x))

    def observed(self, x: Tensor) -> Tensor:
        """What the observer is to see of x."""
        return x

    def begin_search(self) -> bool:
        """Called once all items were observed; True asks for a ``score`` call per item before ``commit``."""
        return False

    def score(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> None:
        """Judge candidate parameters on one item by the error of what they lead to; an empty item says nothing.

        Args:
            x: the tensor, floating point.
            product: maps ``t = x[..., rows, :]``, any rows, any values, to the output that it leads to.
        """
        if x.numel():
            self.add_errors(self.judge(x, product))

    def judge(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """Every candidate's error on an item, for ``add_errors``; arguments of ``score``."""
        raise NotImplementedError

    def add_errors(self, errors: Tensor) -> None:
        """Count what ``judge`` gave, of this process or another."""
        raise NotImplementedError

    def commit(self) -> None:
        """Take the parameters from what was observed and scored; nothing of an earlier calibration stays."""
        raise NotImplementedError

    def learnable_scales(self) -> list[nn.Parameter]:
        """Parameters that reconstruction learns besides the rounding."""
        return []

    def keep_valid(self) -> None:
        """Project learned parameters back to their domain (after an optimizer step)."""

    def milestone(self, done: float) -> bool:
        """Called during reconstruction at the shares ``MILESTONES`` of its iterations; True if ``scale`` is a new
        parameter."""
        return False

    def finish(self) -> None:
        """Take the final form (called by ``freeze``; idempotent)."""

    def problems(self) -> list[str]:
        """What keeps it from its final form, for the audit; beyond the modes, which the audit checks itself."""
        return []

    def calculate_qparams(self):
        """(scale, zero_point) of the current parameters, as ``torch.ao.quantization`` asks for."""
        return self.scale, self.zero_point

    def quantize_compiled(self, x: Tensor) -> Tensor:
        """``quantize(x)`` in operators that ``torch.compile`` and ``torch.export`` follow; no gradients."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.quantize_compiled(x) if self.quantizing else x
        if self.observing:
            self.observe(x.detach())
        if not self.quantizing:
            return x
        return self.quantize(x, Drop.draw(x, self.prob))

    def extra_repr(self) -> str:
        return f"{self.family}, bits={self.bits}, role={self.role!r}, ch_axis={self.ch_axis}"


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


def per_channel(values: Tensor, ch_axis: int, ndim: int) -> Tensor:
    """(C,) values viewed so that they broadcast along ``ch_axis`` of ``ndim`` dimensions; per tensor: as they are."""
    if ch_axis == -1:
        return values
    shape = [1] * ndim
    shape[ch_axis] = -1
    return values.view(shape)
