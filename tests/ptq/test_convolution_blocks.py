# SPDX-License-Identifier: Apache-2.0
"""Blocks of timm's networks of convolutions and gated MLPs, all the way: the same bits unquantized, near at 8 bits, an
audit that passes at 4 bits; and what no spec can hold yet is left out by name."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import SwiGLU, SwiGLUPacked
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from ahcq_plugin import quantize
from ahcq_plugin.export.from_model import make_spec
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq import Recipe, audit, calibrate, freeze, prepare
from ahcq_plugin.ptq.coverage import IN_UNITS, INTEGERS
from ahcq_plugin.ptq.prepared import weight_layers
from ahcq_plugin.quantizers.layers import QuantConv2d

WIDTHS = (8, 8, 8, 8)


def first_block(name: str, part: str = "stages.0.blocks.0", **options) -> nn.Module:
    return timm.create_model(name, num_classes=2, **options).get_submodule(part)


class GatedBlock(nn.Module):
    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), mlp

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1)
        return (y + self.mlp(self.norm(y))).permute(0, 3, 1, 2)


STAGES = dict(depths=(1, 1, 1, 1))
BLOCKS = {
    "convnext by convolutions": lambda: first_block("convnext_atto", dims=WIDTHS, **STAGES),
    "convnextv2": lambda: first_block("convnextv2_tiny", dims=WIDTHS, **STAGES),
    "repvit": lambda: first_block("repvit_m0_9", embed_dim=WIDTHS, depth=(1, 1, 1, 1)),
    "MBConv": lambda: InvertedResidual(8, 8, exp_ratio=2.0, act_layer=nn.SiLU, se_layer=SqueezeExcite),
    "groups": lambda: Bottleneck(16, 4, cardinality=4),
    "SwiGLU": lambda: GatedBlock(SwiGLU(8, 16)),
    "SwiGLU in one Linear": lambda: GatedBlock(SwiGLUPacked(8, 32)),
}


class Net(nn.Module):
    """The head keeps all of the block's output."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.blocks = nn.Sequential(block)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x) + x


def lively(model: nn.Module) -> nn.Module:
    """Scales and statistics away from 0 and 1, where they would hide what a block does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim == 1 or name.endswith("gamma"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.5)
    return model.eval()


def block_and_items(kind: str) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = lively(Net(BLOCKS[kind]()))
    layer = next(m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    width = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    return model, [torch.randn(2, width, 8, 8) for _ in range(2)]


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_work_end_to_end(kind):
    model, items = block_and_items(kind)
    keys = list(model.state_dict())
    quantized = prepare(copy.deepcopy(model), Recipe.from_config("rtn", w_bits=8, a_bits=8))
    assert list(prepared_units(quantized)) == ["blocks.0"]
    state = quantized.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items()) and set(keys) <= set(state)
    with torch.no_grad():
        expected = model.blocks(items[0])
        assert torch.equal(quantized.blocks(items[0]), expected)
        calibrate(quantized, items[:1], progress=False)
        freeze(quantized)
        error = (quantized.blocks(items[0]) - expected).norm() / expected.norm()
    report = audit(quantized, items[0])
    assert report.passed, report.problems
    assert 0 < error < 0.05
    kinds = {part.kind for part in report.coverage.parts if part.macs}
    assert kinds == {INTEGERS}, "every multiply-accumulate is on integers"
    assert any(part.name == "norms, biases, scales" for part in report.coverage.parts if part.kind == IN_UNITS)
    _, report = quantize(model, items, "ahcq", iterations=3, progress=False)
    assert report.audit.passed, report.audit.problems


def test_learned_rounding_of_grouped_convolutions_lowers_the_error():
    """One set of parameters for each output channel, whatever the groups; reconstruction beats rounding to nearest."""
    model, items = block_and_items("groups")
    errors = {}
    for recipe in ("rtn", "brecq"):
        quantized, _ = quantize(model, items, recipe, w_bits=2, a_bits=8, iterations=150, progress=False)
        for layer in weight_layers(quantized).values():
            assert isinstance(layer, QuantConv2d) and layer.weight_fake_quant.scale.numel() == layer.out_channels
        with torch.no_grad():
            errors[recipe] = float(sum((quantized.blocks(x) - model.blocks(x)).pow(2).mean() for x in items))
    assert {layer.groups for layer in weight_layers(quantized).values()} == {1, 4}
    assert errors["brecq"] < 0.8 * errors["rtn"], errors


def test_grouped_convolutions_are_in_the_spec():
    model, items = block_and_items("convnextv2")
    quantized, _ = quantize(model, items, "rtn", progress=False)
    spec = make_spec(quantized, items[0])
    (unit,) = spec.units
    assert [matmul.layer for matmul in unit.matmuls] == ["conv_dw", "mlp.fc1", "mlp.fc2"]
    assert unit.matmuls[0].groups == 8 and spec.left_out == ()
