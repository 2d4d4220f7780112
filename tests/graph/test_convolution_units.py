# SPDX-License-Identifier: Apache-2.0
"""Networks with blocks of convolutions: which modules are units, and what stays outside by name."""

from __future__ import annotations

import logging

import pytest
import timm
import torch
from torch import Tensor, nn

from ahcq_plugin.graph import UncoveredError, find_roles, find_units, prepared_units, trace_unit
from ahcq_plugin.ptq import Recipe, prepare
from ahcq_plugin.ptq.coverage import OUTSIDE, cover

STAGES = dict(depths=(1, 1, 1, 1))
TIMM = {
    "convnext_tiny": (dict(dims=(8, 16, 24, 32), **STAGES), [f"stages.{i}.blocks.0" for i in range(4)]),
    "convnextv2_atto": (dict(dims=(8, 16, 24, 32), **STAGES), [f"stages.{i}.blocks.0" for i in range(4)]),
    "repvit_m0_9": (
        dict(embed_dim=(8, 16, 24, 32), depth=(2, 1, 1, 1)),
        ["stages.0.blocks.0", "stages.0.blocks.1"]
        + [f"stages.{i}.{part}" for i in (1, 2, 3) for part in ("downsample", "blocks.0")],
    ),
    "tiny_vit_5m_224": (
        dict(embed_dims=(16, 32, 32, 32), num_heads=(1, 2, 2, 2), window_sizes=(2, 2, 2, 2), **STAGES),
        ["stages.0.blocks.0", *(f"stages.{i}.{part}" for i in (1, 2, 3) for part in ("downsample", "blocks.0"))],
    ),
    "maxvit_rmlp_pico_rw_256": (
        dict(embed_dim=(32, 32, 32, 32), depths=(1, 2, 1, 1)),
        ["stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1", "stages.2.blocks.0", "stages.3.blocks.0"],
    ),
    "resnet18": (dict(), [f"layer{i}.{k}" for i in (1, 2, 3, 4) for k in (0, 1)]),
}


@pytest.mark.parametrize("name", TIMM)
def test_units_of_timm_models(name):
    options, expected = TIMM[name]
    with torch.device("meta" if name == "resnet18" else "cpu"):
        model = timm.create_model(name, num_classes=2, **options).eval()
    assert find_units(model) == expected


class ConvNorm(nn.Sequential):
    def __init__(self, inside: int, outside: int, kernel: int = 1, groups: int = 1):
        super().__init__()
        self.add_module("c", nn.Conv2d(inside, outside, kernel, padding=kernel // 2, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(outside))


class Inverted(nn.Module):
    """MBConv; without the sum also a downsampling layer."""

    def __init__(self, width: int, extra: nn.Module | None = None):
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(width, 2 * width), ConvNorm(2 * width, 2 * width, 3, 2 * width)
        self.conv3, self.act = ConvNorm(2 * width, width), nn.GELU()
        self.extra = nn.Identity() if extra is None else extra

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.extra(self.conv3(self.act(self.conv2(self.act(self.conv1(x)))))))


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.local_conv = ConvNorm(width, width, 3, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(y).chunk(3, dim=-1)
        y = self.proj((q @ k.transpose(1, 2)).softmax(-1) @ v)
        return self.local_conv(x + y.transpose(1, 2).view_as(x))


class Stage(nn.Module):
    def __init__(self, *blocks: nn.Module, downsample: nn.Module | None = None):
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class LayerNorm2d(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x - x.mean(1, keepdim=True)
        y = y / torch.sqrt(y.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * y + self.bias[:, None, None]


def neck(width: int) -> nn.Sequential:
    layers = nn.Conv2d(width, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
    return nn.Sequential(layers[0], LayerNorm2d(8), layers[1], LayerNorm2d(8))


class PlainNeck(nn.Module):
    """As ``neck``, not as a list."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.norm1, self.conv2, self.norm2 = neck(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))))


class DynamicNeck(PlainNeck):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.abs().max() > 0 else x[:, :8]


class Encoder(nn.Module):
    """As MobileSAM and TinySAM: stem, stages of MBConv and of attention, a neck two levels above the blocks."""

    def __init__(self, width: int = 8, neck: nn.Module | None = None):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.seq = nn.Sequential(ConvNorm(3, 4, 3), nn.GELU(), ConvNorm(4, width, 3))
        self.layers = nn.ModuleList(
            [
                Stage(Inverted(width), Inverted(width), downsample=Inverted(width)),
                Stage(Attention(width), downsample=Inverted(width)),
                Stage(Attention(width)),
            ]
        )
        self.neck = neck if neck is not None else globals()["neck"](width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.seq(x)
        for layer in self.layers:
            x = layer(x)
        return self.neck(x)


ENCODER_UNITS = ["0.blocks.0", "0.blocks.1", "0.downsample", "1.blocks.0", "1.downsample", "2.blocks.0"]


def model_of(encoder: nn.Module) -> nn.Module:
    model = nn.Module()
    model.image_encoder = encoder
    model.forward = encoder.forward
    return model.eval()


@pytest.mark.parametrize("kind", [neck, PlainNeck])
def test_mobile_sam_like_encoders_have_their_neck(kind):
    model = model_of(Encoder(neck=kind(8)))
    expected = [*(f"image_encoder.layers.{unit}" for unit in ENCODER_UNITS), "image_encoder.neck"]
    assert find_units(model) == expected
    prepare(model, Recipe.from_config("rtn"))
    assert find_units(model) == expected, "the units of a prepared model are those that it has"


def test_a_neck_that_does_not_trace_stays_outside_and_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        units = find_units(model_of(Encoder(neck=DynamicNeck(8))))
    assert units == [f"image_encoder.layers.{unit}" for unit in ENCODER_UNITS]
    assert "'image_encoder.neck' holds convolutions, is no unit and stays in floating point" in caplog.text


def test_a_bare_list_of_convolutions_has_no_forward_and_coverage_names_it():
    model = model_of(Encoder(neck=nn.ModuleList(neck(8))))
    prepare(model, Recipe.from_config("rtn"))
    assert list(prepared_units(model)) == [f"image_encoder.layers.{unit}" for unit in ENCODER_UNITS]
    outside = {part.name: part.weights for part in cover(model).parts if part.kind == OUTSIDE}
    assert outside["image_encoder.neck"] == 8 * 8 + 8 * 8 * 9 + 4 * 8
    assert set(outside) == {"image_encoder.neck", "image_encoder.patch_embed"}


class Residual(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.m = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


class TwoKernels(nn.Module):
    """A depthwise convolution of two kernel sizes, as RepVGG trains it: part of a block, no block."""

    def __init__(self, width: int):
        super().__init__()
        self.conv, self.conv1 = ConvNorm(width, width, 3, width), nn.Conv2d(width, width, 1)
        self.bn = LayerNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x) + self.conv1(x) + x)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class RepBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.token_mixer = nn.Sequential(TwoKernels(width), SqueezeExcite(width))
        self.channel_mixer = Residual(nn.Sequential(ConvNorm(width, 16), nn.GELU(), ConvNorm(16, width)))

    def forward(self, x: Tensor) -> Tensor:
        return self.channel_mixer(self.token_mixer(x))


def test_the_block_is_the_unit_and_not_its_parts():
    encoder = nn.Module()  # as EdgeSAM: one list of blocks, fusing convolutions and a neck beside it
    encoder.features = nn.ModuleList([ConvNorm(3, 8, 3), RepBlock(8), RepBlock(8)])
    encoder.fuse, encoder.neck = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Upsample(scale_factor=2)), neck(8)
    model = nn.Module()
    model.image_encoder = encoder
    assert find_units(model.eval()) == [f"image_encoder.{part}" for part in ("features.1", "features.2", "neck")]
    sites = find_roles(trace_unit(encoder.features[1], "block"))
    layers = [layer for site in sites for layer in site.layers]
    assert {site.role for site in sites} == {"conv_in"} and len(layers) == len(set(layers)) == 6
    assert ("token_mixer.0.conv.c", "token_mixer.0.conv1") in [site.layers for site in sites], "one tensor, one site"


@pytest.mark.parametrize(
    ("layer", "name"),
    [(nn.ConvTranspose2d(8, 8, 1), "ConvTranspose2d"), (nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 8, 1)), "Conv1d")],
)
def test_other_convolutions_are_refused_by_name_or_stay_outside_with_a_warning(layer, name, caplog):
    model = model_of(Stage(Inverted(8), Inverted(8, layer)))
    with caplog.at_level(logging.WARNING):
        assert find_units(model) == ["image_encoder.blocks.0"]
    assert f"{name} has weights and is no Linear, Conv2d or norm" in caplog.text
    assert "'image_encoder.blocks.1' holds convolutions" in caplog.text
    with pytest.raises(UncoveredError, match=rf"image_encoder.blocks.1.*{name} has weights.*`leave=`"):
        prepare(model, Recipe.from_config("rtn"), units="image_encoder.blocks.1")
