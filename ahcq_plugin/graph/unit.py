# SPDX-License-Identifier: Apache-2.0
"""A unit: the traced form of one block of a model, in whose place it stands."""

from __future__ import annotations

import copy
import linecache
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx, nn
from torch.ao.quantization import FakeQuantizeBase

from ahcq_plugin.graph.bare_weights import layer_bare_weights
from ahcq_plugin.graph.calls import Call
from ahcq_plugin.graph.stored_graph import StoredNode, graph_of, stored
from ahcq_plugin.graph.tracer import OUR_DIR, TORCH_DIR, BlockTracer
from ahcq_plugin.quantizers.layers import keep_hooks

UNIT_KEY = "ahcq_unit"


class UnitError(RuntimeError):
    """A model cannot be quantized as it is: a unit does not trace, is not reached, or its values are not finite."""


class UncoveredError(UnitError, ValueError):
    """A unit would compute something in floating point that is neither allowed nor left by the caller."""


class Unit(fx.GraphModule):
    """A ``GraphModule`` of which copies and pickles keep everything: attributes, hooks, unused tensors, the nodes'
    source lines (torch's lose what the graph does not name). It is an instance of its block's class as well, since
    other code finds layers by ``isinstance``."""

    @classmethod
    def of(cls, root: nn.Module | dict[str, Any], graph: fx.Graph, block: type[nn.Module]) -> Unit:
        """A unit that stands for an instance of ``block``; ``root`` has what the graph names."""
        unit = cls(root, graph, class_name=block.__name__)
        _become(unit, block)
        unit.recompile()
        return unit

    def __deepcopy__(self, memo: dict[int, Any]) -> Unit:
        twin = Unit.__new__(Unit)
        memo[id(self)] = twin
        return _filled(twin, block_class(self), copy.deepcopy(self.__dict__, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: value for name, value in self.__dict__.items() if name != "_graph"}
        return _unit_of, (block_class(self), stored(self.graph), state)


def _unit_of(block_class: type[nn.Module], nodes: list[StoredNode], state: dict[str, Any]) -> Unit:
    return _filled(Unit.__new__(Unit), block_class, {**state, "_graph": graph_of(nodes)})


def _filled(unit: Unit, block_class: type[nn.Module], state: dict[str, Any]) -> Unit:
    graph = state.pop("_graph")
    unit.__dict__.update(state)
    _become(unit, block_class)
    unit.graph = graph  # compiles
    return unit


def _become(unit: Unit, block_class: type[nn.Module]) -> None:
    """Make ``unit`` an instance of the class of its block too, but of none of torch's: those are followed by what they
    compute (``nn.MultiheadAttention``), which the unit computes otherwise."""
    bases = (Unit,) if block_class.__module__.startswith("torch.") else (Unit, block_class)
    unit.__class__ = type(block_class.__name__, bases, {})  # of its own, as fx does: compiling writes into it


def block_class(unit: fx.GraphModule) -> type[nn.Module]:
    """The class of the block that a unit stands for; nn.Module where that is torch's."""
    return (*type(unit).__bases__, nn.Module)[1] if isinstance(unit, Unit) else nn.Module


def trace_unit(module: nn.Module, name: str, leave: Sequence[str] = (), call: Call | None = None) -> Unit:
    """Trace a unit in eval mode; parameters are shared with ``module`` and keep their paths.

    Args:
        module: the unit. Its training flags are restored afterwards.
        name: its module name, for messages and ``meta``.
        leave: what of it may stay in floating point (see ``graph/allowed.py``), kept in ``meta``.
        call: how it is really called (see ``BlockTracer``), kept in ``meta``.
    Returns:
        A GraphModule with the unit's ``state_dict`` keys, its attributes, forward hooks and those of the modules in
        it, and ``meta["ahcq_unit"]`` with the keys ``name``, ``leave``, ``call`` and ``placements`` (empty).
    Raises:
        UnitError: the unit does not trace; names it and the source line that stopped the tracer.
    """
    attributes = set(vars(module))
    try:
        with eval_mode(module):
            graph = BlockTracer(call).trace(module)
        traced = Unit.of(module, graph, type(module))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnitError(
            f"unit '{name}' ({type(module).__name__}) does not trace{_source_line(error)}: {reason}. "
            "Rewrite that code without control flow on tensor values, or leave the unit out with `units=`"
        ) from error
    finally:
        for constant in set(vars(module)) - attributes:  # constants that fx stores on the traced module
            delattr(module, constant)
    keep_state(module, traced)
    layer_bare_weights(module, traced)
    keep_attributes(module, traced)
    traced.meta[UNIT_KEY] = {"name": name, "leave": tuple(leave), "call": call, "placements": []}
    return traced


def keep_attributes(source: nn.Module, traced: Unit) -> None:
    """What the code around a unit may read of it: attributes that are no modules; hooks of the unit itself.

    The bare modules that fx puts between a unit and its layers get the class of what they stand for as well, but for
    torch's own (``nn.MultiheadAttention``), which has been written out.
    """
    for path, module in source.named_modules():
        try:
            target = traced.get_submodule(path)
        except AttributeError:
            continue
        if target is module:  # a leaf, shared
            continue
        if type(target) is nn.Module and not type(module).__module__.startswith("torch."):
            target.__class__ = type(module)
        elif target is not traced:
            continue
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE and name not in vars(target) and not _holds_module(value):
                target.__dict__[name] = value
    keep_hooks(source, traced)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _holds_module(value: Any) -> bool:
    """Such an attribute would keep floating-point layers alive that no longer run."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list | set):
        return any(map(_holds_module, value))
    return isinstance(value, nn.Module) or isinstance(getattr(value, "__self__", None), nn.Module)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, every submodule's own training flag restored after."""
    flags = [(child, child.training) for child in module.modules()]
    try:
        if any(flag for _, flag in flags):
            module.eval()
        yield
    finally:
        for child, flag in flags:
            child.training = flag


def _source_line(error: BaseException) -> str:
    """' at file:line: `code`' of the innermost frame of user code, or '' if there is none."""
    ours, found = (TORCH_DIR, OUR_DIR, "<"), ""
    for frame, number in traceback.walk_tb(error.__traceback__):  # extract_tb fails on code objects that fx patches
        file, number = frame.f_code.co_filename, number or frame.f_code.co_firstlineno  # such a frame may have no line
        if not file.startswith(ours):
            found = f" at {file}:{number}: `{linecache.getline(file, number).strip()}`"
    return found


def keep_state(source: nn.Module, traced: fx.GraphModule) -> None:
    """Give ``traced`` the state-dict keys of ``source``: fx drops unused tensors and makes all buffers persistent.

    Fake quantizers in ``traced`` keep their state as it is.
    """
    known = set()
    quantizers = [m for m in traced.modules() if isinstance(m, FakeQuantizeBase)]
    of_quantizers = {id(buffer) for quantizer in quantizers for buffer in quantizer.buffers()}
    for prefix, module in source.named_modules(remove_duplicate=False):
        parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        buffers = dict(module.named_buffers(recurse=False, remove_duplicate=False))
        known.update(f"{prefix}.{name}".lstrip(".") for name in buffers)
        if not parameters and not buffers:
            continue
        target = _submodule(traced, prefix)
        if target is module:  # a leaf, shared
            continue
        for name, parameter in parameters.items():
            target.register_parameter(name, parameter)
        for name, buffer in buffers.items():
            target.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
    for prefix, module in list(traced.named_modules()):
        for name, buffer in list(module.named_buffers(recurse=False)):
            if f"{prefix}.{name}".lstrip(".") not in known and id(buffer) not in of_quantizers:
                module.register_buffer(name, buffer, persistent=False)


def _submodule(root: nn.Module, path: str) -> nn.Module:
    for atom in filter(None, path.split(".")):
        if not hasattr(root, atom):
            root.add_module(atom, nn.Module())
        root = getattr(root, atom)
    return root
