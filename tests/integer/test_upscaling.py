# SPDX-License-Identifier: Apache-2.0
"""Mask upscaling in floating point, one item after another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ahcq_plugin.integer import to_integer
from ahcq_plugin.integer.upscaling import ItemByItem, upscale_item_by_item
from tests.conftest import make_tiny_sam
from tests.integer.conftest import quantized_sam, quantized_sam2


@pytest.mark.parametrize("items", [0, 1, 2, 5])
def test_values_are_those_of_the_whole_batch(items):
    whole = make_tiny_sam().mask_decoder.output_upscaling
    holder = nn.ModuleDict({"upscaling": make_tiny_sam().mask_decoder.output_upscaling})
    upscale_item_by_item(holder)
    x = torch.randn(items, whole[0].in_channels, 4, 6, generator=torch.Generator().manual_seed(items))
    with torch.no_grad():
        wanted, got = whole(x), holder["upscaling"](x)
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_a_layer_sees_one_item_at_a_time_and_hooks_stay():
    upscaling = nn.Sequential(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.GELU())
    seen, whole = [], []
    upscaling[1].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    upscaling.register_forward_hook(lambda _, args, out: whole.append((len(args[0]), len(out))))
    keys = list(upscaling.state_dict())
    upscale_item_by_item(nn.ModuleList([upscaling]))
    upscaling(torch.ones(3, 2, 4, 4))
    assert seen == [1, 1, 1] and whole == [(3, 3)]
    assert list(upscaling.state_dict()) == keys and len(list(upscaling)) == 2


@pytest.mark.parametrize("quantized", [lambda: quantized_sam("rtn", 8), quantized_sam2], ids=["SAM", "SAM 2"])
def test_only_the_integer_model_has_it_and_only_for_upscaling(quantized):
    model = quantized()
    integer = to_integer(model)
    changed = [name for name, module in integer.named_modules() if isinstance(module, ItemByItem)]
    assert len(changed) == 1 and changed[0].endswith("output_upscaling")
    assert not any(isinstance(module, ItemByItem) for module in model.modules())
