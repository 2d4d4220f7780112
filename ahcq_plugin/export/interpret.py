# SPDX-License-Identifier: Apache-2.0
"""Run a quantized unit node by node and hand every matmul's integer codes to a callback."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ahcq_plugin.export import golden
from ahcq_plugin.export.matmul import Matmul, Patches
from ahcq_plugin.export.sites import OperandSource, Site, find_sites
from ahcq_plugin.functional.uniform import UniformParams
from ahcq_plugin.ptq.unit_runner import UnitRunner
from ahcq_plugin.quantizers import UniformFakeQuantize


@dataclass(frozen=True)
class Call:
    """One execution of a matmul.

    Attributes:
        site: which one.
        left: int64 codes of the left operand as the node reads it (a convolution's: (B, C, H, W)).
        right: int64 codes of the right operand as the node reads it, (..., k, n); None with a constant weight.
        left_params, right_params: of an operand whose uniform quantizer has several scales, scale and zero point of
            every code, its shape; else None.
        float_output: computes what PyTorch gives.
        rescale: applies the scalar factors between quantizers and operands to the product of the operands.
    """

    site: Site
    left: Tensor
    right: Tensor | None
    left_params: UniformParams | None
    right_params: UniformParams | None
    float_output: Callable[[], Tensor]
    rescale: Callable[[Tensor], Tensor]


class UnitInterpreter(UnitRunner):
    """Runs a unit; ``on_matmul(call)`` gives the output of each matmul.

    Args:
        unit: from ``prepare``, frozen.
    Attributes:
        sites: node of each matmul -> its site, in the order of execution.
        left_out: nodes of layers and matmuls that have none -> the reason.
    """

    def __init__(self, unit: fx.GraphModule, on_matmul: Callable[[Call], Tensor]):
        super().__init__(unit)
        self.on_matmul = on_matmul
        sites, self.left_out = find_sites(unit)
        self.sites = {site.node: site for site in sites}
        operands = [operand for site in sites for operand in (site.left, site.right) if operand is not None]
        self.quantizers = {operand.quantizer for operand in operands}
        self.steps = {node: operand for operand in operands for node in operand.path}
        self.codes: dict[fx.Node, Any] = {}
        self.params: dict[fx.Node, UniformParams] = {}
        self.scalings: dict[fx.Node, Callable[[Any], Any]] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What ``unit(*args, **kwargs)`` returns."""
        self.codes.clear()
        self.params.clear()
        self.env.clear()
        return super().run(*self.bound(args, kwargs))

    def run_node(self, n: fx.Node) -> Any:
        """One node; codes are carried along beside the values."""
        if n in self.quantizers:
            quantizer, x = self.submodules[n.target], self.env[n.all_input_nodes[0]]
            self.codes[n] = quantizer.encode(x)
            if isinstance(quantizer, UniformFakeQuantize) and quantizer.scale.numel() > 1:
                self.params[n] = quantizer.grids(x.shape)
        elif n in self.steps:
            self._carry(n, self.steps[n])
        if n not in self.sites:
            return super().run_node(n)
        site = self.sites[n]
        plain = super().run_node
        left, right = _end(site.left), None if site.right is None else _end(site.right)
        return self.on_matmul(
            Call(
                site,
                self.codes[left].long(),
                None if right is None else self.codes[right].long(),
                self.params.get(left),
                None if right is None else self.params.get(right),
                lambda: plain(n),
                lambda out: self._rescale(site, out),
            )
        )

    def _carry(self, node: fx.Node, operand: OperandSource) -> None:
        """Codes behind ``node``, and parameters that differ among them; of a scaling the operation is kept, for the
        product (its scalar may be freed soon)."""
        before = operand.path[operand.path.index(node) - 1] if node is not operand.path[0] else operand.quantizer
        if node in operand.scalings:
            self.codes[node], self.scalings[node] = self.codes[before], self._bound(node, before)
            if before in self.params:
                self.params[node] = self.params[before]
            return
        move = self._bound(node, before)
        self.codes[node] = move(self.codes[before])
        if before in self.params:
            self.params[node] = UniformParams(move(self.params[before].scale), move(self.params[before].zero_point))

    def _rescale(self, site: Site, out: Tensor) -> Tensor:
        for operand in (site.left, site.right):
            for node in operand.scalings if operand is not None else ():
                out = self.scalings[node](out)
        return out

    def _bound(self, node: fx.Node, source: fx.Node) -> Callable[[Any], Any]:
        """The node's operation as a function of its input ``source``, all other inputs as they are now."""
        held = [map_arg(part, lambda n: n if n is source else self.env[n]) for part in (node.args, node.kwargs)]

        def apply(value: Any) -> Any:
            args, kwargs = (map_arg(part, lambda n: value) for part in held)
            return getattr(self, node.op)(node.target, args, kwargs)

        return apply


def _end(operand: OperandSource) -> fx.Node:
    """The node that a matmul reads."""
    return operand.path[-1] if operand.path else operand.quantizer


def row_codes(matmul: Matmul, left: Tensor) -> np.ndarray:
    """int64 codes (rows, k) or (..., m, k) as ``golden.run`` takes them; a convolution's are cut into patches."""
    codes = left.detach().cpu().numpy()
    if matmul.patches is not None:
        return cut_patches(codes, matmul.patches, matmul.left.zero_point)
    return codes.reshape(-1, matmul.k) if matmul.kind == "linear" else codes


def cut_patches(codes: np.ndarray, patches: Patches, zero_code: int) -> np.ndarray:
    """Rows of a convolution's matmul.

    Args:
        codes: (B, C, H, W) integers.
        zero_code: what the borders are padded with, the code of the value 0.
    Returns:
        (B * H' * W', C * kernel rows * kernel columns), images first, then output rows, then columns.
    """
    (up, across), (down, right) = patches.padding, patches.stride
    padded = np.pad(codes, ((0, 0), (0, 0), (up, up), (across, across)), constant_values=zero_code)
    windows = np.lib.stride_tricks.sliding_window_view(padded, patches.kernel, axis=(2, 3))[:, :, ::down, ::right]
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, codes.shape[1] * patches.kernel[0] * patches.kernel[1])


def right_codes(matmul: Matmul, call: Call) -> np.ndarray | None:
    """int64 codes of the right operand as ``golden.run`` takes them; None with a constant weight."""
    if call.right is None:
        return None
    right = call.right.cpu().numpy()
    return np.swapaxes(right, -1, -2) if matmul.kind == "qk" else right


def golden_output(matmul: Matmul, call: Call) -> tuple[golden.GoldenResult, Tensor]:
    """The golden model on the codes of ``call``: its result, and its output in the shape that the node gives."""
    result = golden.run(matmul, row_codes(matmul, call.left), right_codes(matmul, call))
    return result, node_output(matmul, call, result.output)


def node_output(matmul: Matmul, call: Call, output: np.ndarray) -> Tensor:
    """What the node of ``call`` gives for the ``output`` float32 (..., m, n) of its matmul: its shape, rescaled."""
    out = torch.from_numpy(output).to(call.left.device)
    if matmul.patches is not None:
        batch, _, height, width = call.left.shape
        sizes = [
            (size + 2 * pad - kernel) // stride + 1
            for size, pad, kernel, stride in zip(
                (height, width), matmul.patches.padding, matmul.patches.kernel, matmul.patches.stride, strict=True
            )
        ]
        out = out.view(batch, *sizes, matmul.n).permute(0, 3, 1, 2).contiguous()
    elif matmul.kind == "linear":
        out = out.view(*call.left.shape[:-1], matmul.n)
    return call.rescale(out)


@contextmanager
def interpreted(
    units: Mapping[str, fx.GraphModule], on_matmul: Callable[[str, Call], Tensor]
) -> Iterator[dict[str, UnitInterpreter]]:
    """Within the context ``UnitInterpreter`` runs the units; ``on_matmul(unit, call)`` gives every matmul's output."""
    interpreters = {name: UnitInterpreter(unit, partial(on_matmul, name)) for name, unit in units.items()}
    with running(interpreters.values()):
        yield interpreters


@contextmanager
def running(interpreters: Collection[UnitInterpreter]) -> Iterator[None]:
    """Within the context each of the interpreters runs its unit."""
    try:
        for interpreter in interpreters:
            interpreter.module.forward = interpreter.run
        yield
    finally:
        for interpreter in interpreters:
            interpreter.module.__dict__.pop("forward", None)
