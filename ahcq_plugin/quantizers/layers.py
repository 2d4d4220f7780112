# SPDX-License-Identifier: Apache-2.0
"""Linear and Conv2d that quantize their weight in forward; parameters keep their names and identity."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class QuantLinear(nn.Linear):
    """``F.linear(x, weight_fake_quant(weight), bias)``.

    ``original_weight`` is the weight before a transform that changes the layer's function (ACNR), else None: the target
    of reconstruction. It is kept outside the state and dropped once the layer is hard-rounded.
    """

    original_weight: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:  # named as nn.Linear's: models call it by keyword too
        return F.linear(input, self.weight_fake_quant(self.weight), self.bias)


class QuantConv2d(nn.Conv2d):
    """``conv2d(x, weight_fake_quant(weight), bias)``; ``original_weight`` as in ``QuantLinear``."""

    original_weight: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight_fake_quant(self.weight), self.bias)


class _ViewMixin:
    """Weight and bias are rows of parameters that the module around it holds and names; it has no such state itself.

    It keeps the parameters, not their holder: copies, pickles and moves to another device keep that sharing; where the
    holder gets a new parameter instead, the audit reports the layer.
    """

    def __init__(
        self,
        weight_name: str,
        weight: nn.Parameter,
        rows: slice = slice(None),
        bias: nn.Parameter | None = None,
        bias_rows: slice = slice(None),
    ):
        nn.Module.__init__(self)
        self.weight_name, self.rows, self.bias_rows = weight_name, rows, bias_rows
        self.held = (weight, bias)  # in a tuple: as attributes, parameters would be registered a second time
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:
        """(out, in) rows of the held matrix: a view of it, the parameter itself where it is the whole."""
        return _take(self.held[0], self.rows)

    @property
    def bias(self) -> Tensor | None:
        """(out,) rows of the held vector, or None."""
        return None if self.held[1] is None else _take(self.held[1], self.bias_rows)


def _take(tensor: Tensor, rows: slice) -> Tensor:
    return tensor if rows.indices(len(tensor)) == (0, len(tensor), 1) else tensor[rows]


class LinearView(_ViewMixin, nn.Linear):
    """A Linear on rows of parameters that the module around it holds.

    Args:
        weight_name: of ``weight`` in that module.
        weight: (n, in) matrix.
        rows: of ``weight``, ``out`` of them.
        bias: vector, or None.
        bias_rows: of ``bias``, ``out`` of them.
    """


class QuantLinearView(_ViewMixin, QuantLinear):
    """``QuantLinear`` for a ``LinearView``; each row is an output channel, so parts of a matrix are quantized apart."""


def held_weight(name: str, layer: nn.Module) -> tuple[str, slice]:
    """The parameter's name that the weight of layer ``name`` goes by, and its rows that are this weight."""
    if isinstance(layer, _ViewMixin):
        return f"{name.rpartition('.')[0]}.{layer.weight_name}".lstrip("."), layer.rows
    return f"{name}.weight", slice(None)


def read_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that ``module`` reads: its own, and those that views in it hold; each once."""
    held = [p for child in module.modules() if isinstance(child, _ViewMixin) for p in child.held if p is not None]
    return list(dict.fromkeys([*module.parameters(), *held]))


def quantize_layer(layer: nn.Linear | nn.Conv2d, weight_fake_quant: nn.Module) -> QuantLinear | QuantConv2d:
    """A quantized layer that shares the parameters of ``layer``.

    Raises:
        TypeError: ``layer`` is neither nn.Linear nor nn.Conv2d.
    """
    if isinstance(layer, LinearView):
        view = QuantLinearView(layer.weight_name, layer.held[0], layer.rows, layer.held[1], layer.bias_rows)
        view.weight_fake_quant = weight_fake_quant
        keep_hooks(layer, view)
        return view.train(layer.training)
    if isinstance(layer, nn.Linear):
        new = QuantLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    elif isinstance(layer, nn.Conv2d):
        new = QuantConv2d(
            layer.in_channels,
            layer.out_channels,
            _pair(layer.kernel_size),
            _pair(layer.stride),
            layer.padding if isinstance(layer.padding, str) else _pair(layer.padding),
            _pair(layer.dilation),
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
            device="meta",
        )
    else:
        raise TypeError(f"only nn.Linear and nn.Conv2d can be quantized, got {type(layer).__name__}")
    new.weight, new.bias = layer.weight, layer.bias
    new.weight_fake_quant = weight_fake_quant
    keep_hooks(layer, new)
    return new.train(layer.training)


_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)


def keep_hooks(source: nn.Module, target: nn.Module) -> None:
    """``target`` stands for ``source``: what others hooked onto its calls goes on to be called."""
    for name in _HOOKS:
        getattr(target, name).update(getattr(source, name))


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Of a Conv2d two; torch declares them once for all convolutions, of any number."""
    vertical, horizontal = sizes
    return vertical, horizontal
