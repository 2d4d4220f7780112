# SPDX-License-Identifier: Apache-2.0
"""Our observers and fake quantizers in the form in which MQBench makes and drives them; needs no MQBench.

MQBench makes a quantizer from a ``QuantizeScheme`` (more arguments than ours take), switches it with
``enable_observer``, ``enable_fake_quant`` and their opposites, and tells nobody that calibration is over. So here
parameters are taken from the observer when fake quantization is switched on after something was observed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ahcq_plugin import quantizers
from ahcq_plugin.functional import adaround
from ahcq_plugin.functional.dropping import Drop
from ahcq_plugin.mqbench.onnx_form import quantize_dequantize
from ahcq_plugin.quantizers import observers


def take_scheme(options: dict[str, Any]) -> Any:
    """Check what only MQBench's schemes have and drop it from ``options``, in place.

    Returns:
        The device that the caller asks for, or None.
    Raises:
        ValueError: a symmetric scheme, or a power-of-two scale.
    """
    qscheme = options.pop("qscheme", None)
    if options.get("quant_min", 0) != 0 or qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric):
        raise ValueError(
            f"ahcq_plugin's quantizers are asymmetric, got quant_min={options.get('quant_min', 0)}, qscheme={qscheme}: "
            "set 'symmetry': False in w_qscheme and a_qscheme"
        )
    if options.pop("pot_scale", False):
        raise ValueError("ahcq_plugin's quantizers have no power-of-two scales: set 'pot_scale': False")
    for name in ("dtype", "reduce_range"):
        options.pop(name, None)
    return (options.pop("factory_kwargs", None) or {}).get("device")


class _MQBenchObserver:
    """Takes MQBench's arguments; also MQBench's own fake quantizers can use these observers."""

    pot_scale = False

    def __init__(self, **options: Any):
        qscheme = options.get("qscheme") or torch.per_tensor_affine
        device = take_scheme(options)
        super().__init__(**options)
        self.qscheme = qscheme
        self.to(device)


class UniformObserver(_MQBenchObserver, observers.AvgMinMaxObserver):
    """Mean over calls of the minimum and of the maximum."""


class WeightObserver(_MQBenchObserver, observers.OwnErrorObserver):
    """The range with the least mean |error|^2.4."""


class SampleObserver(_MQBenchObserver, observers.OutputErrorObserver):
    """Range and a sample of the values, for HLUQ, LNQ, AGQ and power_of_two."""


class ChannelObserver(_MQBenchObserver, observers.ChannelObserver):
    """A range for every channel of the last axis, for CAG."""

    def calculate_qparams(self):
        raise TypeError(
            "CAGObserver goes with CAGFakeQuantize: MQBench's fake quantizers have no channels on the last axis"
        )


class _MQBenchFakeQuantize:
    """Frame around one of our fake quantizers: MQBench's arguments, calibration and export.

    Parameters are taken when fake quantization is switched on and something was observed since; CAG is then grouped
    and LNQ's table rounded at once, since MQBench's loops have no later moment for it.
    """

    #: Something was observed and not yet turned into parameters.
    pending = False

    def __init__(self, observer: Any = None, **options: Any):
        device = take_scheme(options)
        if observer is not None:
            options["observer"] = observer
        super().__init__(**options)
        if not isinstance(self.activation_post_process, observers.RangeObserver):
            raise TypeError(
                f"{type(self).__name__} needs an observer of ahcq_plugin, got "
                f"{type(self.activation_post_process).__name__}; allowed: {', '.join(OBSERVERS)}"
            )
        self.to(device)

    def observe(self, x: Tensor) -> None:
        super().observe(x)
        self.pending = self.pending or x.numel() > 0
        if self.pending and self.quantizing:  # MQBench's enable_all: ranges follow every batch
            self.settle()

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switch fake quantization on or off; on ends a calibration."""
        if enabled and self.pending:
            self.settle()
        super().enable_fake_quant(enabled)

    @torch.no_grad()
    def settle(self) -> None:
        """Take the parameters from what was observed, in their final form."""
        self.commit()
        self.finish()

    def commit(self) -> None:
        super().commit()
        self.pending = False

    def quantize(self, x: Tensor, drop: Drop | None = None) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            return quantize_dequantize(self, x)
        if torch.is_grad_enabled() and self.scale.requires_grad:
            self.keep_valid()  # MQBench's optimizer may carry a small scale below zero
        return super().quantize(x, drop)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.pending = False  # what is loaded counts
        super()._load_from_state_dict(*args, **kwargs)


class UniformFakeQuantize(_MQBenchFakeQuantize, quantizers.UniformFakeQuantize):
    """Uniform, per tensor; scale learned."""


class CAGFakeQuantize(_MQBenchFakeQuantize, quantizers.CAGFakeQuantize):
    """Uniform in a few groups of channels of the last axis (AHCQ-SAM); scales learned."""

    def __init__(self, observer: Any = None, **options: Any):
        if options.get("ch_axis", -1) != -1:
            raise ValueError("CAG finds the channels on the last axis itself: set 'per_channel': False in a_qscheme")
        super().__init__(observer, **options)


class HLUQFakeQuantize(_MQBenchFakeQuantize, quantizers.HLUQFakeQuantize):
    """Powers of two below a point, uniform above (AHCQ-SAM); both scales learned."""


class LNQFakeQuantize(_MQBenchFakeQuantize, quantizers.LNQFakeQuantize):
    """Equal steps of ln(1 + a x) for attention probabilities (AHCQ-SAM); nothing learned."""


class AGQFakeQuantize(_MQBenchFakeQuantize, quantizers.AGQFakeQuantize):
    """Powers of 2^(1/tau) for attention probabilities (PTQ4SAM); scale learned."""


class PowerOfTwoFakeQuantize(_MQBenchFakeQuantize, quantizers.PowerOfTwoFakeQuantize):
    """Powers of two, at most 6 bits; scale learned."""


class AdaRoundFakeQuantize(_MQBenchFakeQuantize, quantizers.AdaRoundFakeQuantize):
    """Weights: uniform per output channel, rounding to nearest or learned."""

    #: The weight of the last observing forward; its range is searched once, when calibration ends.
    seen: Tensor | None = None
    #: The soft weight is of whatever forward is given, not of the weight that ``init`` got.
    follows_input = False

    def observe(self, x: Tensor) -> None:
        self.seen, self.pending = x, True
        if self.quantizing:
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Search the range of the weight and take it."""
        self.activation_post_process.reset()
        self.activation_post_process(self.seen)
        super().settle()

    def commit(self) -> None:
        super().commit()
        self.seen = None

    def init(self, weight: Tensor, round_mode: str | None = None) -> None:
        """Start learning the rounding of ``weight``.

        Args:
            round_mode: given by MQBench, whose layers with a folded BatchNorm then quantize another weight than this.
        """
        if round_mode not in (None, "learned_hard_sigmoid"):
            raise ValueError(f"`round_mode` must be 'learned_hard_sigmoid', got {round_mode!r}")
        self.follows_input = round_mode is not None
        super().init(weight)

    def quantize(self, x: Tensor, drop: Drop | None = None) -> Tensor:
        if self.adaround and self.follows_input:
            self._base = adaround.floor_base(x.detach(), self.params(x.ndim))
        return super().quantize(x, drop)


#: Names in MQBench's ``ObserverDict``.
OBSERVERS = {
    "AHCQWeightObserver": WeightObserver,
    "UniformObserver": UniformObserver,
    "CAGObserver": ChannelObserver,
    "HLUQObserver": SampleObserver,
    "LNQObserver": SampleObserver,
    "AGQObserver": SampleObserver,
    "PowerOfTwoObserver": SampleObserver,
}
#: Names in MQBench's ``FakeQuantizeDict``; it has an AdaRoundFakeQuantize of its own.
FAKE_QUANTIZERS = {
    "AHCQWeightFakeQuantize": AdaRoundFakeQuantize,
    "UniformFakeQuantize": UniformFakeQuantize,
    "CAGFakeQuantize": CAGFakeQuantize,
    "HLUQFakeQuantize": HLUQFakeQuantize,
    "LNQFakeQuantize": LNQFakeQuantize,
    "AGQFakeQuantize": AGQFakeQuantize,
    "PowerOfTwoFakeQuantize": PowerOfTwoFakeQuantize,
}
#: Activation quantizers by family, as recipes name them.
FAMILIES = {q.family: q for q in FAKE_QUANTIZERS.values() if q is not AdaRoundFakeQuantize}
