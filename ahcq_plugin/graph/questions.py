# SPDX-License-Identifier: Apache-2.0
"""Questions of a model's code whose answer changes nothing in the graph: a unit need not check them.

``is_causal = length > 1 and mask is None and is_causal`` asks for a length, and computes the same whatever it is where
the last is False.
"""

from __future__ import annotations

from itertools import chain, combinations

from torch import fx, nn

from ahcq_plugin.graph.calls import Call
from ahcq_plugin.graph.fixed import check_answer
from ahcq_plugin.graph.structure import Keys
from ahcq_plugin.graph.tracer import BlockTracer
from ahcq_plugin.graph.unit import eval_mode

#: Questions at most that one unit is freed of: every combination of answers is traced.
MOST = 3


def drop_idle_questions(unit: fx.GraphModule, module: nn.Module, call: Call) -> list[str]:
    """Take those checks of yes-or-no answers out of a traced unit without which it computes the same, in place.

    A question is dropped if the code, given any combination of answers to it and to those dropped before, computes the
    same and asks nothing whose answer the unit does not check.

    Args:
        unit: ``trace_unit`` of ``module`` with ``call``.
    Returns:
        Lines of the model's code that ask what was dropped.
    """
    checks = {node.name: node for node in unit.graph.nodes if _asks_yes_or_no(node)}
    if not checks:
        return []
    plain = _Trace(module, call)
    free: tuple[str, ...] = ()
    for key in dict.fromkeys(plain.yes_or_no.values()):
        others = chain.from_iterable(combinations(free, count) for count in range(len(free) + 1))
        if len(free) < MOST and all(_is_idle(plain, module, call, {key, *chosen}, {key, *free}) for chosen in others):
            free = (*free, key)
    dropped = [checks[name] for name, key in plain.yes_or_no.items() if key in free]
    for node in dropped:
        _erase(unit.graph, node)
    if dropped:
        unit.recompile()
    return [str(node.args[2]) for node in dropped]


def _asks_yes_or_no(node: fx.Node) -> bool:
    return node.target is check_answer and isinstance(node.args[1], bool)


class _Trace:
    """One trace of a module.

    Attributes:
        answers: key of a question -> its answer.
        yes_or_no: name of a check -> key of its question.
        computed: keys of all nodes but those that only questions need, in order.
    """

    def __init__(self, module: nn.Module, call: Call, turned: frozenset[str] = frozenset()):
        self.tracer = BlockTracer(call, turned)  # kept: it holds the constants that keys tell apart by identity
        attributes = set(vars(module))
        try:
            with eval_mode(module):
                graph = self.tracer.trace(module)
            keys = Keys(module)
            self.answers = {key: answer for _, key, answer in self.tracer.asked}
            self.yes_or_no = {node.name: key for node, key, _ in self.tracer.asked if _asks_yes_or_no(node)}
            asking = _only_asking(graph)
            self.computed = [keys.of(node) for node in graph.nodes if node not in asking]
        finally:
            for constant in set(vars(module)) - attributes:
                delattr(module, constant)


def _only_asking(graph: fx.Graph) -> set[fx.Node]:
    """The checks of answers, and what nothing but they need."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        needed = node.op == "placeholder" or not node.users or any(user not in found for user in node.users)
        if node.target is check_answer or not needed:
            found.add(node)
    return found


def _is_idle(plain: _Trace, module: nn.Module, call: Call, turned: set[str], free: set[str]) -> bool:
    try:
        other = _Trace(module, call, frozenset(turned))
    except Exception:  # noqa: BLE001  (whatever the model's code raises on that way, it is another way)
        return False
    asked = all(plain.answers.get(key) == answer for key, answer in other.answers.items() if key not in free)
    return asked and other.computed == plain.computed


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """With what only it needed."""
    stack = [node]
    while stack:
        current = stack.pop()
        if not current.users and current.op not in ("placeholder", "output"):
            sources = current.all_input_nodes
            graph.erase_node(current)
            stack += sources
