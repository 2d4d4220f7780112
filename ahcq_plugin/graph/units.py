# SPDX-License-Identifier: Apache-2.0
"""Choose the units of a model: by structure, or by types, names and globs."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterable

from torch import fx, nn
from torch.nn import functional as F

from ahcq_plugin.graph.allowed import find_uncovered, listed
from ahcq_plugin.graph.calls import Call, Calls
from ahcq_plugin.graph.ops import GraphIndex
from ahcq_plugin.graph.roles import find_attentions
from ahcq_plugin.graph.unit import UNIT_KEY, trace_unit
from ahcq_plugin.graph.untraceable import treatment

logger = logging.getLogger(__name__)
UnitSpec = str | type[nn.Module]
_LISTS = (nn.ModuleList, nn.Sequential)
_NO_FORWARD = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_ATTENTION_NAMES = frozenset({"softmax", "scaled_dot_product_attention"})


def find_units(
    model: nn.Module, units: UnitSpec | Iterable[UnitSpec] | None = None, calls: Calls | None = None
) -> list[str]:
    """Names of the modules to quantize, in registration order; none lies inside another.

    Args:
        model: nothing is run and nothing changed; parameters may be on the meta device.
        units: None finds, by structure, (a) elements of a ModuleList or Sequential that hold attention or a normalised
            MLP and no such elements of their own, (b) attention modules outside of these, (c) elements that are blocks
            of convolutions: two or more Conv2d or Linear, of which one Conv2d, a norm and an activation (MBConv,
            RepViT, ConvNeXt), and such blocks beside the elements of a stage (downsampling), (d) modules of nothing but
            two or more Conv2d and norms beside such a list or anything around it (necks), (e) in a model with such
            lists, the elements of ModuleLists that hold nothing but Sequentials of Conv2d and norms (feature pyramids),
            (f) SAM 2's memory encoder as a whole. What is found by (c) and (d) but cannot be a unit stays in floating
            point, with a warning. Else module types, exact names or globs (``*`` crosses dots; the outermost matches
            count, ModuleLists excepted).
        calls: how the modules are really called (``record_calls``): more of them trace.
    Raises:
        ValueError: a type, name or glob matches no module, or names a module without ``forward``.
        TypeError: an item of ``units`` is neither a type nor a string.
    """
    if units is None:
        chosen = _by_structure(model, calls or Calls({}, {}))
    else:
        if not isinstance(units, str | type | list | tuple | set | frozenset):
            raise TypeError(f"`units` takes types, names and globs, or a list of them, got {units!r:.60}")
        specs = [units] if isinstance(units, str | type) else list(units)
        chosen = {name for spec in specs for name in _matches(model, spec)}
    outermost = {name for name in chosen if not any(_inside(name, other) for other in chosen)}
    return [name for name, _ in model.named_modules() if name in outermost]


def _matches(model: nn.Module, spec: UnitSpec) -> list[str]:
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(spec, type):
        names, label = [n for n, m in modules.items() if isinstance(m, spec)], spec.__name__
    elif isinstance(spec, str):
        label = spec
        if isinstance(modules.get(spec), _NO_FORWARD):
            kind = type(modules[spec]).__name__
            raise ValueError(f"`units` entry {spec!r} is a {kind}, which has no forward; use '{spec}.*'")
        names = [spec] if spec in modules else fnmatch.filter(modules, spec)
        names = [n for n in names if not isinstance(modules[n], _NO_FORWARD)]
    else:
        raise TypeError(f"`units` takes module types, names and globs, got {spec!r}")
    if not names:
        known = [n for n, m in modules.items() if next(m.children(), None) is not None] or list(modules)
        raise ValueError(f"`units` entry {label!r} matches no module; some module names: {', '.join(known[:8])}")
    return names


def _inside(name: str, other: str) -> bool:
    return name.startswith(other + ".")


def _by_structure(model: nn.Module, calls: Calls) -> set[str]:
    modules = dict(model.named_modules())
    elements = {name: name.rpartition(".")[0] for name in modules if name}
    elements = {name: container for name, container in elements.items() if isinstance(modules[container], _LISTS)}
    units: set[str] = set()
    for name, module in reversed(modules.items()):  # inner lists first
        if name in elements and _free_of(name, units) and _is_block(module, name, calls):
            units.add(name)
    blocks = set(units)
    for name, module in reversed(modules.items()):
        if name and _apart_from(name, units) and _is_attention(module, name, calls):
            units.add(name)
    for name, module in reversed(modules.items()):
        if name in elements and _apart_from(name, units) and _is_convolution_block(module, name, calls):
            units.add(name)
            blocks.add(name)
    parents = {_parent(elements[name]) for name in blocks}
    around = {outer for parent in parents for outer in _paths_to(parent)}
    for name, module in modules.items():
        in_stage = name not in elements and _parent(name) in parents and _parent(name) in elements
        if name and _apart_from(name, units) and in_stage and _is_convolution_block(module, name, calls):
            units.add(name)
    for name, module in modules.items():
        if name and _apart_from(name, units) and _parent(name) in around and _is_neck(module, name, calls):
            units.add(name)
    for name, module in modules.items():
        is_pyramid = isinstance(module, nn.ModuleList) and len(module) and all(_is_convolutional(m, 1) for m in module)
        if parents and is_pyramid:
            units.update(f"{name}.{child}".lstrip(".") for child, _ in module.named_children())
    return units | {name for name, module in modules.items() if name and treatment(module).is_unit}


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _paths_to(name: str) -> list[str]:
    """``a.b`` -> ``["", "a", "a.b"]``: the model itself, what is around the module, and the module."""
    atoms = name.split(".")
    return ["", *(".".join(atoms[: count + 1]) for count in range(len(atoms)))]


def _apart_from(name: str, units: set[str]) -> bool:
    """Neither a unit, nor around nor inside one."""
    return _free_of(name, units) and not any(_inside(name, unit) for unit in units)


def _free_of(name: str, units: set[str]) -> bool:
    """Neither a unit nor around one."""
    return name not in units and not any(_inside(unit, name) for unit in units)


def _is_prepared(module: nn.Module) -> bool:
    return isinstance(module, fx.GraphModule) and UNIT_KEY in module.meta


def _is_block(module: nn.Module, name: str, calls: Calls) -> bool:
    if _is_prepared(module):
        return True
    if not _has_layers(module) or _is_called_differently(name, calls):
        return False
    index = _trace(module, name, calls.by_name.get(name))
    if index is None:  # prepare then says which line does not trace, instead of leaving the block out silently
        return any(_mentions_attention(m) for m in module.modules())
    return _has_attention(index) or _has_normed_mlp(module, index)


def _is_attention(module: nn.Module, name: str, calls: Calls) -> bool:
    if _is_prepared(module):
        return True
    if not _has_layers(module) or _is_called_differently(name, calls):
        return False
    index = _trace(module, name, calls.by_name.get(name))
    if index is None and _mentions_attention(module):
        logger.warning("'%s' looks like attention but does not trace: it is no unit and stays in floating point", name)
    return index is not None and _has_attention(index)


def _is_called_differently(name: str, calls: Calls) -> bool:
    if name in calls.problems:
        logger.warning("'%s' %s: it is no unit and stays in floating point", name, calls.problems[name])
    return name in calls.problems


def _is_convolution_block(module: nn.Module, name: str, calls: Calls) -> bool:
    layers = [type(m) for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    normed = any("norm" in type(m).__name__.lower() for m in module.modules())  # with an activation in it, too
    if isinstance(module, _NO_FORWARD) or len(layers) < 2 or not normed:
        return False
    if not any(issubclass(kind, nn.Conv2d) for kind in layers):
        return False
    index = _trace_plain(module, name, calls)
    return index is not None and any(map(index.is_activation, index.graph.nodes))


def _is_neck(module: nn.Module, name: str, calls: Calls) -> bool:
    """Nothing but convolutions, two or more, and norms: a Sequential, or a module with a ``forward`` of its own."""
    if isinstance(module, nn.Sequential):
        return _is_convolutional(module, 2)
    parts = [m for m in module.modules() if next(m.children(), None) is None]
    if isinstance(module, _NO_FORWARD) or not all(isinstance(m, nn.Conv2d) or _is_norm(m) for m in parts):
        return False
    convolutions = sum(isinstance(m, nn.Conv2d) for m in parts)
    return convolutions >= 2 and _trace_plain(module, name, calls) is not None


def _is_convolutional(module: nn.Module, least: int) -> bool:
    """A Sequential of Conv2d, ``least`` or more, and norms."""
    if not isinstance(module, nn.Sequential) or not all(isinstance(m, nn.Conv2d) or _is_norm(m) for m in module):
        return False
    return sum(isinstance(m, nn.Conv2d) for m in module) >= least


def _is_norm(module: nn.Module) -> bool:
    """LayerNorm, BatchNorm, GroupNorm, RMSNorm, and hand-written norms: those have no common base class but a name."""
    return "norm" in type(module).__name__.lower() and next(module.children(), None) is None


def _has_layers(module: nn.Module) -> bool:
    """Enough matrices for an attention or an MLP: spares tracing everything else."""
    if isinstance(module, _NO_FORWARD):
        return False
    kinds = [type(m) for m in module.modules() if isinstance(m, nn.Linear | nn.MultiheadAttention)]
    return len(kinds) >= 2


def _trace(module: nn.Module, name: str, call: Call | None) -> GraphIndex | None:
    try:
        gm = trace_unit(module, name, call=call)
    except RuntimeError as error:
        logger.debug("%s", error)
        return None
    return GraphIndex(gm, gm.graph)


def _trace_plain(module: nn.Module, name: str, calls: Calls) -> GraphIndex | None:
    """The graph of a module that quantization covers wholly; None, with a warning, for any other: networks of
    convolutions are quantized where they can be, attention always."""
    try:
        gm = trace_unit(module, name, call=calls.by_name.get(name))
    except RuntimeError as error:
        logger.warning("'%s' holds convolutions, is no unit and stays in floating point: %s", name, error)
        return None
    problems = find_uncovered(gm)
    if problems:
        logger.warning("'%s' holds convolutions, is no unit and stays in floating point: %s", name, listed(problems))
        return None
    return GraphIndex(gm, gm.graph)


def _has_attention(index: GraphIndex) -> bool:
    if any(isinstance(index.module(n), nn.MultiheadAttention) for n in index.graph.nodes):
        return True
    try:
        return bool(find_attentions(index))
    except ValueError:  # attention that cannot be quantized; find_roles says so
        return True


def _has_normed_mlp(module: nn.Module, index: GraphIndex) -> bool:
    normed = any(map(_is_norm, module.modules())) or any(n.target is F.layer_norm for n in index.graph.nodes)
    return normed and any(_ends_mlp(index, n) for n in index.graph.nodes)


def _ends_mlp(index: GraphIndex, node: fx.Node) -> bool:
    """A Linear fed by an activation fed by a Linear, gated or not."""
    if not isinstance(index.module(node), nn.Linear):
        return False
    source = index.walk_back(node.all_input_nodes[0])[-1]
    if not index.is_activation(source) and not index.is_gated(source):
        return False
    return any(
        isinstance(index.module(origin), nn.Linear)
        for origin in index.ancestors(source, index.is_layer)
        if origin is not source
    )


def _mentions_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.Softmax | nn.MultiheadAttention):
        return True
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and bool(_ATTENTION_NAMES.intersection(code.co_names))


def prepared_units(model: nn.Module) -> dict[str, fx.GraphModule]:
    """The traced units inside ``model`` by name, in registration order."""
    return {name: module for name, module in model.named_modules() if _is_prepared(module)}
