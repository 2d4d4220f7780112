# SPDX-License-Identifier: Apache-2.0
"""What a node of a traced unit is taken for."""

import operator

import pytest
import torch
from torch import fx, nn

from ahcq_plugin.graph.ops import GraphIndex, matmul_operands


def last_node(function):
    """(index, nodes by name, what is returned) of a function of x and y, traced."""
    graph = fx.Tracer().trace(function)
    nodes = {node.name: node for node in graph.nodes}
    return GraphIndex(nn.Module(), graph), nodes, next(iter(nodes["output"].all_input_nodes))


@pytest.mark.parametrize(
    ("function", "keys"),
    [
        (lambda x, y: torch.matmul(x, y), [0, 1]),
        (lambda x, y: torch.matmul(x, other=y), [0, "other"]),
        (lambda x, y: torch.matmul(input=x, other=y), ["input", "other"]),
        (lambda x, y: x.bmm(mat2=y), [0, "mat2"]),
        (lambda x, y: torch.mm(x, y), [0, 1]),
        (lambda x, y: torch.linalg.matmul(x, y), [0, 1]),
        (lambda x, y: torch.baddbmm(y, x, y), [1, 2]),
        (lambda x, y: y.baddbmm(x, batch2=y), [1, "batch2"]),
        (lambda x, y: torch.baddbmm(y, batch1=x, batch2=y, beta=0), ["batch1", "batch2"]),
    ],
)
def test_factors_of_a_matmul(function, keys):
    index, nodes, node = last_node(function)
    assert index.is_matmul(node)
    assert matmul_operands(node) == [(keys[0], nodes["x"]), (keys[1], nodes["y"])]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x * 2,
        lambda x, y: 2 * x,
        lambda x, y: x / y.shape[-1] ** 0.5,
        lambda x, y: -x,
        lambda x, y: torch.mul(x, other=0.5),
        lambda x, y: torch.div(x, 3),
    ],
)
def test_scalar_factors(function):
    index, nodes, node = last_node(function)
    assert index.scale_source(node) is nodes["x"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x * y,
        lambda x, y: torch.mul(x, other=y),
        lambda x, y: 2 / x,
        lambda x, y: operator.truediv(y.shape[0], x),
        lambda x, y: torch.div(x, 3, rounding_mode="floor"),
        lambda x, y: torch.div(x, 3, rounding_mode="trunc"),
        lambda x, y: x + 2,
        lambda x, y: x // 2,
    ],
)
def test_what_is_no_scalar_factor(function):
    index, _, node = last_node(function)
    assert index.scale_source(node) is None
