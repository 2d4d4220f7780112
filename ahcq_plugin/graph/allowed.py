# SPDX-License-Identifier: Apache-2.0
"""What a unit may compute in floating point: a list of what is allowed, so that nothing unknown passes unseen.

Sums, products element by element, norms, activations, softmax, reductions and moves of elements stay in floating point,
as in the papers. Every multiplication of matrices must be a quantized Linear or Conv2d, or a matmul of two quantized
tensors (``ptq/audit.py`` proves that of each). All else is an error, but what is named here as an exception or by the
caller in ``leave=``.
"""

from __future__ import annotations

import fnmatch
import math
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from ahcq_plugin.graph.fixed import CHECKS, put
from ahcq_plugin.graph.multihead import mask_heads, why_kept
from ahcq_plugin.graph.ops import (
    ACTIVATION_MODULES,
    ACTIVATIONS,
    FUNCTIONAL_LAYERS,
    SCALE_OPS,
    SHAPE_FUNCTIONS,
    SHAPE_METHODS,
    SHAPE_MODULES,
    SIZE_METHODS,
    SOFTMAXES,
    GraphIndex,
    function_name,
)
from ahcq_plugin.graph.positions import MOVES, MOVING_FUNCTIONS, exception_of, position_table
from ahcq_plugin.graph.relative_positions import add_relative_positions
from ahcq_plugin.graph.rewrites import mask_causal, mask_scores
from ahcq_plugin.graph.tracer import OUR_DIR, TORCH_DIR
from ahcq_plugin.graph.unit import UNIT_KEY
from ahcq_plugin.graph.untraceable import treatment
from ahcq_plugin.quantizers.layers import LinearView, QuantLinearView


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _named(space: object, names: str) -> frozenset:
    """The functions of ``space`` by these names, those that this version has."""
    return frozenset(getattr(space, name) for name in names.split() if callable(getattr(space, name, None)))


_ARITHMETIC = "add sub mul truediv floordiv mod pow neg abs iadd isub imul itruediv and_ or_ invert eq ne lt le gt ge"
_ELEMENTWISE = (
    "add sub mul div neg abs pow square sqrt rsqrt exp expm1 log log1p log2 sin cos tanh sigmoid reciprocal floor ceil "
    "round sign clamp clamp_min clamp_max minimum maximum where lerp addcmul addcdiv eq ne lt le gt ge logical_not "
    "logical_and logical_or isnan isinf"
)
_REDUCTIONS = "mean sum amax amin max min var std norm argmax argmin any all cumsum"
_MAKES = "zeros ones full empty arange linspace eye zeros_like ones_like full_like empty_like tensor as_tensor"
_COMPLEX = "view_as_complex view_as_real polar complex"
_IN_PLACE = "add_ sub_ mul_ div_ neg_ clamp_ clamp_min_ masked_fill_ copy_ exp_ sigmoid_ tanh_ pow_ sqrt_"

ALLOWED_FUNCTIONS = (
    SHAPE_FUNCTIONS
    | SCALE_OPS
    | ACTIVATIONS
    | SOFTMAXES
    | _named(operator, _ARITHMETIC + " getitem not_ index")
    | _named(torch, " ".join((_ELEMENTWISE, _REDUCTIONS, MOVES, _MAKES, _COMPLEX, "relu relu_ log_softmax _assert")))
    | _named(F, "layer_norm group_norm batch_norm instance_norm rms_norm normalize softplus log_softmax tanh sigmoid")
    | _named(F, "hardsigmoid hardtanh glu dropout dropout1d dropout2d pad interpolate max_pool2d avg_pool2d")
    | _named(F, "adaptive_avg_pool2d adaptive_max_pool2d adaptive_avg_pool1d pixel_shuffle pixel_unshuffle unfold fold")
    | _named(torch, "layer_norm group_norm batch_norm rms_norm pixel_shuffle")
    | _named(math, "sqrt ceil floor log log2 prod isqrt")
    | {getattr, len, int, float, bool, max, min, abs, round, sum, range, slice, tuple, list}
    | CHECKS
    | {put}
    | {mask_scores, mask_causal, mask_heads, add_relative_positions}
)
ALLOWED_METHODS = (
    SHAPE_METHODS
    | SIZE_METHODS
    | _words(" ".join((_ELEMENTWISE, _REDUCTIONS, MOVES, _IN_PLACE)))
    | _words(
        "softmax log_softmax relu relu_ new_zeros new_ones new_full new_empty detach cpu half double bool long int"
    )
    | _words("unfold fill_ zero_ is_floating_point")
)
NORM_MODULES = (
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d),
)
_PLAIN_MODULES = (
    *SHAPE_MODULES,
    *ACTIVATION_MODULES,
    *(nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Softplus, nn.GLU),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    *(nn.AdaptiveMaxPool2d, nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d, nn.PixelShuffle),
    *(nn.PixelUnshuffle, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ConstantPad2d, nn.Unfold, nn.Fold),
    *(nn.PReLU, nn.ChannelShuffle),
)


@dataclass(frozen=True)
class Uncovered:
    """Something in a unit that would compute in floating point without being allowed to.

    Attributes:
        name: of the node, module or parameter: what ``leave=`` takes.
        what: says what it is.
        line: ``file:line`` of the code, where the tracer noted it, else ''.
    """

    name: str
    what: str
    line: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.what}" + (f" (at {self.line})" if self.line else "")


def node_name(node: fx.Node) -> str:
    """The node's name behind that of the module whose code made it: ``attn.addmm``; modules and tensors: their path."""
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    inside = [path for path in node.meta.get("nn_module_stack", ()) if path]
    return f"{inside[-1]}.{node.name}" if inside else node.name


def is_left(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the caller named the node, or a module around it, by name or glob, with or without the unit's name."""
    meta = gm.meta.get(UNIT_KEY, {})
    return any(name_matches(entry, node_name(node), meta.get("name", "")) for entry in meta.get("leave", ()))


def name_matches(entry: str, name: str, unit: str) -> bool:
    """Whether an entry of ``leave`` means ``name`` in the unit ``unit``."""
    names = (name, f"{unit}.{name}", name.rpartition(".")[2])
    return any(fnmatch.fnmatchcase(n, entry) or n.startswith(entry + ".") for n in names)


def find_uncovered(gm: fx.GraphModule) -> list[Uncovered]:
    """What a traced unit computes in floating point although it is on no list of what is allowed, nor in ``leave``.

    Quantized or not: Linear, Conv2d and matmul nodes count as allowed here, since placement and audit answer for them.
    """
    index = GraphIndex(gm, gm.graph)
    return [item for node in gm.graph.nodes if not is_left(gm, node) for item in _check_node(index, node)]


def _check_node(index: GraphIndex, node: fx.Node) -> Iterator[Uncovered]:
    checks = {
        "call_module": _module_problem,
        "get_attr": _parameter_problem,
        "call_function": _call_problem,
        "call_method": _call_problem,
    }
    what = checks[node.op](index, node) if node.op in checks else None
    if what:
        yield Uncovered(node_name(node), what, source_line(node))


def _module_problem(index: GraphIndex, node: fx.Node) -> str | None:
    module = index.module(node)
    if index.is_layer(node) and computed_parameters(module):
        return (
            f"its {' and '.join(computed_parameters(module))} is computed anew at every call (parametrization, weight "
            "norm, spectral norm, pruning): make it a plain parameter first, with `remove_parametrizations`, "
            "`remove_weight_norm`, `remove_spectral_norm` or `prune.remove` of torch.nn.utils"
        )
    if index.is_layer(node) or _is_fake_quantizer(module) or treatment(module).is_leaf:
        return None
    if isinstance(module, (*NORM_MODULES, *_PLAIN_MODULES)):
        return None
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        why = why_kept(module) or "another tracer than BlockTracer kept it whole"
        return f"nn.MultiheadAttention '{node.target}' hides its projections and matmuls: {why}"
    if next(module.parameters(), None) is not None:
        return f"{kind} has weights and is no Linear, Conv2d or norm: it would stay in floating point"
    return f"{kind} is not on the list of what may stay in floating point"


def computed_parameters(layer: nn.Module) -> list[str]:
    """Which of ``weight`` and ``bias`` of a Linear or Conv2d are tensors without being parameters."""
    if isinstance(layer, LinearView | QuantLinearView):  # rows of a parameter
        return []
    given = {name: getattr(layer, name) for name in ("weight", "bias")}
    return [name for name, tensor in given.items() if tensor is not None and not isinstance(tensor, nn.Parameter)]


def _is_fake_quantizer(module: nn.Module | None) -> bool:
    return isinstance(module, torch.ao.quantization.FakeQuantizeBase)


def _call_problem(index: GraphIndex, node: fx.Node) -> str | None:
    if node.op == "call_method":
        allowed = node.target in ALLOWED_METHODS
    else:
        allowed = node.target in ALLOWED_FUNCTIONS or function_name(node) in MOVING_FUNCTIONS
        allowed = allowed or (isinstance(node.target, type) and is_dataclass(node.target))  # an output is put together
    if allowed or index.is_matmul(node) or exception_of(index, node) or index.is_scalar(node):
        return None
    name = function_name(node) or str(node.target)
    if node.target in FUNCTIONAL_LAYERS:
        return f"calls {name} on a bare weight that no nn.Linear or nn.Conv2d can stand for"
    return f"{name}() is not on the list of what may stay in floating point, and no layer that is quantized"


def _parameter_problem(index: GraphIndex, node: fx.Node) -> str | None:
    """A matrix that is read by another way than through its layer; tables of positions that are only added pass, and
    what is asked for its size or dtype alone."""
    tensor = operator.attrgetter(node.target)(index.root)
    if not isinstance(tensor, nn.Parameter) or sum(size > 1 for size in tensor.shape) < 2:
        return None
    if position_table(index, node) or (node.users and all(map(index.is_scalar, node.users))):
        return None
    return f"matrix of shape {tuple(tensor.shape)} is not read by a quantized Linear or Conv2d"


def listed(problems: Sequence[object], most: int = 5) -> str:
    """The first of ``problems`` for a message of one line, and how many more there are."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(map(str, problems[:most])) + more


def source_line(node: fx.Node) -> str:
    """``file:line`` of the innermost line of the model's own code that made the node, '' where none was noted."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    own = [f"{file}:{line}" for file, line in frames if not file.startswith((OUR_DIR, TORCH_DIR))]
    return own[-1] if own else ""
