# SPDX-License-Identifier: Apache-2.0
"""Find the roles of a traced unit's tensors from its graph, never from names.

========== ==========================================================================
qkv_in     input of a Linear whose output reaches an operand of an attention matmul
mlp_in     input of a Linear followed by an activation (GELU, ReLU, …) or a gate: both Linears of a gated MLP
post_act   input of a Linear fed by an activation
gated_act  input of a Linear fed by a gated product, act(gate) * up (SwiGLU, GEGLU, GLU)
softmax    attention weights, factor of the second attention matmul
q, k, v    factors of the attention matmuls, before scalar factors; q is that of tables of relative positions too
attn_out   input of a Linear fed by the second attention matmul
conv_in    input of a Conv2d, whatever its groups
other_in   input of any other Linear
========== ==========================================================================

What a tensor is (post_act, gated_act, attn_out) goes before what it is used for (qkv_in, mlp_in). ``gated_act`` is kept
apart from ``post_act`` because it has both signs and its bulk in the middle of its range: HLUQ, with its fine levels at
the minimum, gains nothing on it, groups of channels (CAG) do.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from ahcq_plugin.graph.allowed import Uncovered, find_uncovered, is_left, listed, node_name, source_line
from ahcq_plugin.graph.ops import EINSUMS, Edge, GraphIndex, function_name, layer_input, matmul_operands
from ahcq_plugin.graph.positions import exception_of
from ahcq_plugin.graph.relative_positions import multiplies_table
from ahcq_plugin.graph.unit import UNIT_KEY, UncoveredError

LAYER_ROLES = ("qkv_in", "mlp_in", "post_act", "gated_act", "attn_out", "conv_in", "other_in")
ROLES = ("qkv_in", "q", "k", "v", "softmax", "attn_out", "mlp_in", "post_act", "gated_act", "conv_in", "other_in")


@dataclass(frozen=True)
class RoleSite:
    """One tensor in one role.

    ``node`` produces the tensor; ``consumers`` are the uses that belong to the role, as (node, index of the positional
    or name of the keyword argument); ``layers`` names the consuming Linear/Conv2d (none for q, k, v, softmax).
    """

    node: fx.Node
    role: str
    consumers: tuple[Edge, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Attention:
    """The nodes of one attention: scores = matmul(q, k), softmax, context = matmul(softmax, v)."""

    scores: fx.Node
    softmax: fx.Node
    context: fx.Node


def find_attentions(index: GraphIndex) -> list[Attention]:
    """Every softmax that stands between two matmuls, in graph order.

    Raises:
        ValueError: the scores or the context of an attention come from einsum.
    """
    attentions = []
    for softmax in filter(index.is_softmax, index.graph.nodes):
        users = [n for n in index.walk_forward(softmax) if index.is_matmul(n) or function_name(n) == "einsum"]
        context = users[0] if users else None
        scores = _scores(index, softmax)
        if context is None or scores is None:
            continue
        for node in (scores, context):
            if node.target in EINSUMS:
                raise ValueError(f"attention by einsum (node '{node.name}') is not supported; write it with matmul")
        attentions.append(Attention(scores, softmax, context))
    return attentions


def _scores(index: GraphIndex, softmax: fx.Node) -> fx.Node | None:
    def stop(node: fx.Node) -> bool:
        product = index.is_matmul(node) or node.target in EINSUMS
        return product or (node is not softmax and node.op == "call_module" and index.shape_source(node) is None)

    einsum = None
    for node in index.ancestors(softmax, stop):
        # A table times q (relative positions) is a product too, but not the scores.
        if index.is_matmul(node) and all(index.walk_back(a)[-1].op != "get_attr" for _, a in matmul_operands(node)):
            return node
        if node.target in EINSUMS:
            einsum = node
    return einsum


def find_weight_layers(gm: fx.GraphModule) -> list[str]:
    """Names of the Linear and Conv2d that the unit calls, in graph order, each once."""
    index = GraphIndex(gm, gm.graph)
    return list(dict.fromkeys(n.target for n in gm.graph.nodes if index.is_layer(n)))


def find_roles(gm: fx.GraphModule) -> list[RoleSite]:
    """Activation sites of a traced unit, in graph order of their tensors; one per (tensor, role).

    Every Linear and Conv2d input belongs to exactly one site, and so does every factor of an attention matmul. When one
    tensor has several roles, each use of it belongs to one site. A unit's own arguments are rewired only towards the
    attention when they are q, k or v themselves; every other q, k, v and softmax is rewired for all its consumers.

    Args:
        gm: from ``trace_unit``, without quantizers.
    Raises:
        ValueError: the unit holds something that would silently stay in floating point (``graph/allowed.py``): it is
            named with its line.
    """
    index = GraphIndex(gm, gm.graph)
    unit = gm.meta.get(UNIT_KEY, {}).get("name", type(gm).__name__)
    try:
        attentions = find_attentions(index)
    except ValueError as error:
        raise ValueError(f"unit '{unit}': {error}, or leave the unit out with `units=`") from error
    _refuse_floating_point(gm, index, unit, attentions)

    claims = _Claims()
    projections = _projections(index, attentions)
    contexts = {a.context for a in attentions}
    for node in filter(index.is_layer, gm.graph.nodes):
        if multiplies_table(node):  # with the queries, whose codes it reads
            continue
        key, source = layer_input(node)
        claims.add(source, _layer_role(index, node, source, projections, contexts), [(node, key)])
    operands = [operand for attention in attentions for operand in _operands(index, attention)]
    for role, path in operands:
        claims.add(path[-1], role, [_edge_on(index, path)])
    for role, path in operands:
        if path[-1].op != "placeholder" and claims.holds(path[-1], role):
            claims.add(path[-1], role, index.edges(path[-1]))
    return claims.sites(index)


class _Claims:
    """Uses of tensors by (tensor, role); the first claim of a use counts."""

    def __init__(self) -> None:
        self._owner: dict[tuple[fx.Node, fx.Node, int | str], str] = {}

    def add(self, node: fx.Node, role: str, edges: list[Edge]) -> None:
        for edge in edges:
            self._owner.setdefault((node, *edge), role)

    def holds(self, node: fx.Node, role: str) -> bool:
        return any(key[0] is node and owner == role for key, owner in self._owner.items())

    def sites(self, index: GraphIndex) -> list[RoleSite]:
        order = {node: i for i, node in enumerate(index.graph.nodes)}
        grouped: dict[tuple[fx.Node, str], list[Edge]] = {}
        for (node, *edge), role in self._owner.items():
            grouped.setdefault((node, role), []).append(tuple(edge))
        sites = []
        for node, role in sorted(grouped, key=lambda site: (order[site[0]], ROLES.index(site[1]))):
            edges = grouped[node, role]
            edges.sort(key=lambda edge: (order[edge[0]], str(edge[1])))
            layers = dict.fromkeys(n.target for n, _ in edges if role in LAYER_ROLES)
            sites.append(RoleSite(node, role, tuple(edges), tuple(layers)))
        return sites


def _layer_role(
    index: GraphIndex, layer: fx.Node, source: fx.Node, projections: set[fx.Node], contexts: set[fx.Node]
) -> str:
    if isinstance(index.module(layer), nn.Conv2d):
        return "conv_in"
    origin = index.walk_back(source)[-1]
    if index.is_activation(origin):
        return "post_act"
    if index.is_gated(origin):
        return "gated_act"
    if origin in contexts:
        return "attn_out"
    if layer in projections:
        return "qkv_in"
    return "mlp_in" if any(_opens_mlp(index, user) for user in index.walk_forward(layer)) else "other_in"


def _opens_mlp(index: GraphIndex, node: fx.Node) -> bool:
    """An activation, a gated product, or the sigmoid that gates one."""
    if index.is_activation(node) or index.is_gated(node):
        return True
    return index.is_sigmoid(node) and any(map(index.is_gated, index.walk_forward(node)))


def _projections(index: GraphIndex, attentions: list[Attention]) -> set[fx.Node]:
    """Linear nodes whose output reaches q, k or v, also through norms, rotary embeddings, biases."""

    def stop(node: fx.Node) -> bool:
        return index.is_layer(node) or index.is_matmul(node) or index.is_softmax(node)

    paths = [path for a in attentions for role, path in _operands(index, a) if role != "softmax"]
    return {n for path in paths for n in index.ancestors(path[1], stop) if index.is_layer(n)}


def _operands(index: GraphIndex, attention: Attention) -> list[tuple[str, list[fx.Node]]]:
    """(role, path from the matmul over its operand back to the tensor to quantize) of q, k, softmax and v."""
    (_, left), (_, right) = matmul_operands(attention.scores)
    paths = [("q", index.walk_back(left, False)), ("k", index.walk_back(right, False))]
    paths = [(role, [attention.scores, *path]) for role, path in paths]
    for _, operand in matmul_operands(attention.context):
        path = index.walk_back(operand, True)
        if attention.softmax in path:
            paths.append(("softmax", [attention.context, *path[: path.index(attention.softmax) + 1]]))
        else:
            paths.append(("v", [attention.context, *index.walk_back(operand, False)]))
    return paths


def _edge_on(index: GraphIndex, path: list[fx.Node]) -> Edge:
    """The use of the path's last node, the tensor, by the node before it."""
    tensor, user = path[-1], path[-2]
    return next(edge for edge in index.edges(tensor) if edge[0] is user)


def _refuse_floating_point(gm: fx.GraphModule, index: GraphIndex, unit: str, attentions: list[Attention]) -> None:
    """Raise ValueError where something would silently stay in floating point."""
    quantized = {node for a in attentions for node in (a.scores, a.context)}
    problems = find_uncovered(gm)
    problems += [
        Uncovered(node_name(node), "a product of two tensors that belongs to no attention", source_line(node))
        for node in gm.graph.nodes
        if index.is_matmul(node) and node not in quantized and not (is_left(gm, node) or exception_of(index, node))
    ]
    if problems:
        raise UncoveredError(
            f"unit '{unit}' would compute in floating point: {listed(problems)}. Write it with "
            "nn.Linear, nn.Conv2d or softmax attention by matmul, name it in `leave=`, or leave the unit out with "
            "`units=`"
        )
