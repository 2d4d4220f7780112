# SPDX-License-Identifier: Apache-2.0
"""Choose the units of a model: by structure, or by types, names and globs."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterable

from torch import fx, nn
from torch.nn import functional as F

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
            MLP and no such elements of their own, (b) attention modules outside of these, (c) Sequentials of two or
            more Conv2d and norms beside such a list (necks), (d) in a model with such lists, the elements of
            ModuleLists that hold nothing but Sequentials of Conv2d and norms (feature pyramids), (e) SAM 2's memory
            encoder as a whole. Else module types, exact names or globs (``*`` crosses dots; the outermost matches
            count, ModuleLists excepted).
        calls: how the modules are really called (``record_calls``): more of them trace.
    Raises:
        ValueError: a type, name or glob matches no module, or names a module without ``forward``.
        TypeError: an item of ``units`` is neither a type nor a string.
    """
    if units is None:
        chosen = _by_structure(model, calls or Calls({}, {}))
    else:
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
    units: set[str] = set()
    parents: set[str] = set()
    for name, module in reversed(modules.items()):  # inner lists first
        container = name.rpartition(".")[0]
        is_element = bool(name) and isinstance(modules[container], _LISTS)
        if is_element and _free_of(name, units) and _is_block(module, name, calls):
            units.add(name)
            parents.add(container.rpartition(".")[0])
    for name, module in reversed(modules.items()):
        if not name or not _free_of(name, units) or any(_inside(name, u) for u in units):
            continue
        if _is_attention(module, name, calls):
            units.add(name)
    for parent in parents:
        for child, module in modules[parent].named_children():
            name = f"{parent}.{child}".lstrip(".")
            if _free_of(name, units) and _is_convolutional(module, 2):
                units.add(name)
    for name, module in modules.items():
        is_pyramid = isinstance(module, nn.ModuleList) and len(module) and all(_is_convolutional(m, 1) for m in module)
        if parents and is_pyramid:
            units.update(f"{name}.{child}".lstrip(".") for child, _ in module.named_children())
    return units | {name for name, module in modules.items() if name and treatment(module).is_unit}


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
    """A Linear fed by an activation fed by a Linear."""
    if not isinstance(index.module(node), nn.Linear):
        return False
    activation = index.walk_back(node.all_input_nodes[0])[-1]
    if not index.is_activation(activation) or not activation.all_input_nodes:
        return False
    return isinstance(index.module(index.walk_back(activation.all_input_nodes[0])[-1]), nn.Linear)


def _mentions_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.Softmax | nn.MultiheadAttention):
        return True
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and bool(_ATTENTION_NAMES.intersection(code.co_names))


def prepared_units(model: nn.Module) -> dict[str, fx.GraphModule]:
    """The traced units inside ``model`` by name, in registration order."""
    return {name: module for name, module in model.named_modules() if _is_prepared(module)}
