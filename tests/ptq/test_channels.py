# SPDX-License-Identifier: Apache-2.0
"""The axis of the channels in a unit's output is where its layers and what follows them put it."""

import pytest
import torch
from torch import nn

from ahcq_plugin.graph import prepared_units, trace_unit
from ahcq_plugin.ptq import Recipe, prepare
from ahcq_plugin.ptq.channels import channel_axes
from ahcq_plugin.ptq.prepared import intercepted
from ahcq_plugin.zoo.sam import box_forward
from tests.conftest import make_clips


def axes_of(module, *shape):
    return channel_axes(
        module if isinstance(module, nn.Linear) else trace_unit(module, "unit"), (torch.randn(shape),), {}
    )


class Block(nn.Module):
    """A residual MLP on (N, H, W, C); ``ending`` gives its output from the sum."""

    def __init__(self, ending=lambda x: x, first=lambda x: x, width=6):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.first, self.ending = first, ending

    def forward(self, x):
        x = self.first(x)
        return self.ending(x + self.down(torch.relu(self.up(self.norm(x)))))


class Convolutions(nn.Module):
    def __init__(self, ending=lambda x: x):
        super().__init__()
        self.one, self.two = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 5, 3, padding=1)
        self.norm, self.ending = nn.LayerNorm(5), ending

    def forward(self, x):
        x = self.two(torch.relu(self.one(x)))
        mean = x.mean(1, keepdim=True)
        return self.ending((x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6))


def test_units_have_their_channels_where_their_last_layer_puts_them():
    conv, linear = nn.Conv2d(2, 2, 1), nn.Linear(2, 2)
    x = (torch.randn(2, 2, 2, 2),)
    for layers in ((conv, nn.ReLU()), (linear, conv)):
        assert axes_of(nn.Sequential(*layers), 2, 2, 2, 2) == [1]
    assert axes_of(nn.Sequential(conv, linear), 2, 2, 2, 2) == [3]
    assert channel_axes(conv, x, {}) == [1] and channel_axes(linear, x, {}) == [-1]


@pytest.mark.parametrize(
    "unit, axis",
    [
        (Block(), 3),
        (Block(lambda x: x.permute(0, 3, 1, 2)), 1),
        (Block(lambda x: x.transpose(1, 3)), 1),
        (Block(lambda x: x.flatten(1, 2).transpose(1, 2)), 1),
        (Block(lambda x: torch.relu(x.permute(0, 3, 1, 2) * 0.5)), 1),
        (Block(lambda x: nn.functional.pad(x.permute(0, 3, 1, 2), (0, 2, 1, 0))), 1),
        (Block(lambda x: x.permute(3, 0, 1, 2).reshape(6, -1)), 0),
        (Convolutions(), 1),
        (Convolutions(lambda x: x.permute(0, 2, 3, 1)), 3),
        (Convolutions(lambda x: x.flatten(2).transpose(1, 2)), 2),
    ],
)
def test_what_follows_the_last_layer_may_move_them(unit, axis):
    """Sides of 6 as well: sizes alone could not tell."""
    assert axes_of(unit, 2, 6, 6, 6) == [axis]


def test_a_block_between_images_sums_over_channels_not_width():
    unit = trace_unit(Block(lambda x: x.permute(0, 3, 1, 2), lambda x: x.permute(0, 2, 3, 1)), "unit")
    assert channel_axes(unit, (), {"x": torch.randn(1, 6, 3, 5)}) == [1]


def test_every_output_has_its_own_axis():
    unit = Block(lambda x: {"last": x, "first": [x.permute(0, 3, 1, 2), x.shape[1]]})
    assert axes_of(unit, 2, 3, 4, 6)[:2] == [3, 1]


def test_channels_spread_over_several_axes_count_as_the_layers():
    assert axes_of(Block(lambda x: x.unflatten(-1, (2, 3))), 2, 3, 4, 6) == [-1]
    assert axes_of(nn.Sequential(nn.Conv2d(4, 4, 1), nn.PixelShuffle(2)), 1, 4, 3, 3) == [1]


def last_layer_axis(unit):
    layers = [m for m in unit.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return 1 if isinstance(layers[-1], nn.Conv2d) else -1


def unit_axes(model, forward, item):
    """unit -> [(found axis, axis of its last layer)] of the outputs of its calls, from the left."""
    prepare(model, Recipe.from_config("ahcq"))
    units, found = prepared_units(model), {}

    def handler(name, unit_forward, args, kwargs):
        out = unit_forward(*args, **kwargs)
        leaves = torch.utils._pytree.tree_leaves(out)
        axes = channel_axes(units[name], args, kwargs)
        wanted = last_layer_axis(units[name])
        found[name] = [
            (axis % leaf.ndim, wanted % leaf.ndim)
            for axis, leaf in zip(axes, leaves, strict=True)
            if isinstance(leaf, torch.Tensor) and leaf.ndim
        ]
        return out

    with torch.no_grad(), intercepted(units, handler):
        forward(model, item)
    assert found.keys() == units.keys()
    return found


def test_units_of_sam(tiny_sam, tiny_items):
    found = unit_axes(tiny_sam, box_forward, tiny_items[1])
    assert found["image_encoder.neck"] == [(1, 1)]
    assert all(axis == wanted for pairs in found.values() for axis, wanted in pairs), found


def test_units_of_sam2(small_sam2):
    from ahcq_plugin.zoo.track import clip_forward

    found = unit_axes(small_sam2, clip_forward, make_clips(1)[0])
    assert found["memory_encoder"][0] == (1, 1)
    assert all(axis == wanted for pairs in found.values() for axis, wanted in pairs), found
