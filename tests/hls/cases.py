# SPDX-License-Identifier: Apache-2.0
"""Layers for the hardware tests: every family, bit width, kind of product, with tails of K and N."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np

from ahcq_plugin.export import golden
from ahcq_plugin.hls import HLSOptions, Layer
from ahcq_plugin.hls.vectors import Vectors

_SPEC = importlib.util.spec_from_file_location("export_specs", Path(__file__).parents[1] / "export" / "specs.py")
specs = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(specs)

#: name -> (kind, family of the left operand, bits of left and right, k, n, family of the right operand if not uniform)
SHAPES = {
    "uniform": ("linear", "uniform", 4, 4, 21, 10),
    "grouped": ("linear", "grouped", 4, 4, 22, 9),
    "hluq": ("linear", "hluq", 4, 4, 19, 10),
    "table": ("linear", "table", 4, 4, 18, 11),
    "qk": ("qk", "uniform", 4, 4, 21, 10),
    "av": ("av", "uniform", 4, 4, 18, 9),
    "av_table": ("av", "table", 4, 4, 21, 10),
    "qk_heads": ("qk", "per_head", 4, 5, 9, 10),
    "av_table_heads": ("av", "table", 4, 4, 7, 6, "per_head"),
    "uniform_8": ("linear", "uniform", 8, 8, 9, 5),
    "grouped_6": ("linear", "grouped", 6, 3, 25, 6),
    "hluq_8": ("linear", "hluq", 8, 8, 13, 4),
    "table_3": ("linear", "table", 3, 5, 7, 7),
    "av_table_8": ("av", "table", 8, 6, 9, 5),
}
OPTIONS = HLSOptions(pe=8, simd=4, out=4)


def make_matmul(
    kind: str,
    family: str,
    bits: int,
    right_bits: int,
    k: int,
    n: int,
    rng: np.random.Generator,
    right_family: str = "uniform",
):
    """A random matmul; the accumulators are as narrow as the spec allows."""
    if kind == "linear":
        return specs.make_linear(family, bits, k, n, rng, right_bits)
    product = specs.make_product(kind, family, bits, k, n, rng, right_family)
    right = specs.make_left(right_family, right_bits, k, rng)
    width = specs.signed_bits(*specs.accumulator_range(product.left, right, k))
    return dataclasses.replace(product, right=right, accumulator_bits=width)


def make_layer(name: str, shape: tuple | None = None, seed: int = 0) -> Layer:
    """A layer of ``shape`` or SHAPES[name]; hluq with L in the middle, grouped with at least three groups."""
    kind, family, *shape = shape or SHAPES[name]
    shape, right_family = shape[:4], "".join(shape[4:]) or "uniform"
    for attempt in range(100):
        matmul = make_matmul(kind, family, *shape, np.random.default_rng([seed, attempt]), right_family)
        if family == "grouped" and matmul.left.groups < 3:
            continue
        if family == "hluq" and not 3 <= matmul.left.log_levels <= 2**matmul.left.bits - 4:
            continue
        return Layer("", dataclasses.replace(matmul, name=name), OPTIONS)
    raise AssertionError(f"no random matmul for {name}")


def differences(layer: Layer, vectors: Vectors, accumulators: np.ndarray, output: np.ndarray) -> tuple[int, int]:
    """How many accumulators, and how many float32 outputs, differ from the golden model in any bit."""
    wanted = golden.run(layer.matmul, vectors.left, vectors.right)
    assert accumulators.shape == wanted.accumulators.shape and output.shape == wanted.output.shape
    wrong = int((accumulators != wanted.accumulators).sum())
    return wrong, int((output.view(np.uint32) != wanted.output.view(np.uint32)).sum())
