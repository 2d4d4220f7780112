# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq import Recipe, calibrate, prepare, quantizers, set_quantization
from ahcq_plugin.ptq.prepared import is_weight
from ahcq_plugin.ptq.stream import UnitStream
from ahcq_plugin.zoo.sam import box_forward, build_sam

SAM_UNITS = [
    "image_encoder.blocks.0",
    "image_encoder.blocks.1",
    "image_encoder.neck",
    "mask_decoder.transformer.layers.0",
    "mask_decoder.transformer.layers.1",
    "mask_decoder.transformer.final_attn_token_to_image",
]


@pytest.fixture
def prepared(tiny_sam, tiny_items):
    prepare(tiny_sam, Recipe.from_config("qdrop", w_bits=3, a_bits=3))
    calibrate(tiny_sam, tiny_items, box_forward, progress=False)
    return tiny_sam


def record_inputs(model, items, quantized: bool):
    """The oracle: run the whole model and look at what each unit gets."""
    set_quantization(model, quantized)
    seen = {}
    handles = [
        unit.register_forward_hook(
            lambda _, args, kwargs, out, name=name: seen.setdefault(name, []).append((args, kwargs, out)),
            with_kwargs=True,
        )
        for name, unit in prepared_units(model).items()
    ]
    with torch.no_grad():
        for item in items:
            box_forward(model, item)
    for handle in handles:
        handle.remove()
    return seen


def assert_same(got, expected):
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cache_device", ["cpu", "disk"])
def test_units_get_the_inputs_of_both_models(prepared, tiny_items, tmp_path, cache_device):
    floating = record_inputs(prepared, tiny_items, False)
    quantized = record_inputs(prepared, tiny_items, True)
    stream = UnitStream(prepared, tiny_items, box_forward, cache_device, tmp_path)
    assert stream.order == SAM_UNITS
    for name in stream.order:
        stream.collect(name)
        for item in range(len(tiny_items)):
            assert_same(stream.inputs("floating", item), floating[name][item][:2])
            assert_same(stream.inputs("quantized", item), quantized[name][item][:2])
            assert_same(stream.target(name, item), floating[name][item][2])
        stream.advance(name)
    stream.close()
    assert not list(tmp_path.iterdir())


def test_no_unit_is_computed_twice_per_model(prepared, tiny_items):
    stream = UnitStream(prepared, tiny_items, box_forward)
    # A hook on the unit also sees calls that are looked up, so count a layer inside it.
    computed = dict.fromkeys(stream.order, 0)
    for name, unit in prepared_units(prepared).items():
        layer = next(m for m in unit.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
        layer.register_forward_hook(lambda *_, name=name: computed.__setitem__(name, computed[name] + 1))
    for name in stream.order:
        stream.collect(name)
        stream.advance(name)
    last = stream.order[-1]
    assert computed == {name: len(tiny_items) * (1 if name == last else 2) for name in stream.order}


def test_only_outputs_that_are_still_read_are_kept(prepared, tiny_items):
    stream = UnitStream(prepared, tiny_items, box_forward)
    for name in SAM_UNITS[:3]:
        stream.collect(name)
        stream.advance(name)
    assert {key[0] for key in stream._outputs._items} == {"image_encoder.neck"}
    stream.collect(SAM_UNITS[3])
    assert {key[0] for key in stream._outputs._items} == {SAM_UNITS[3]}  # the neck's are its inputs now


def test_unit_never_called_is_refused(prepared, tiny_items):
    with pytest.raises(RuntimeError, match=r"never calls unit 'mask_decoder.transformer.layers.0'; leave it out"):
        UnitStream(prepared, tiny_items, lambda model, item: model.image_encoder(item["image"]))


@pytest.mark.slow
def test_caches_of_a_full_size_decoder_stay_small():
    """For 32 images, 16 of their boxes each (the default); in full precision, for 100 boxes, it would be 54 GB."""
    sam = build_sam("vit_b", checkpoint=False)
    sam.image_encoder = nn.Identity()
    torch.manual_seed(0)
    corners = torch.rand(16, 2) * 500
    item = {"image": torch.randn(1, 256, 64, 64), "boxes": torch.cat([corners, corners + 300], 1)}
    prepare(sam, Recipe.from_config("rtn"))
    for _, quantizer in quantizers(sam):  # not calibrated: any grid that keeps boxes apart
        quantizer.scale.data.fill_(0.005 if is_weight(quantizer) else 0.2)
        quantizer.zero_point.fill_(8)
    stream = UnitStream(sam, [item], box_forward)
    gigabytes = {}
    for name in stream.order:
        stream.collect(name)
        gigabytes[name] = stream._inputs.nbytes() * 32 / 1e9
        stream.advance(name)
    assert gigabytes["mask_decoder.transformer.layers.1"] < 2.5
    assert gigabytes["mask_decoder.transformer.final_attn_token_to_image"] < 4.5  # keys with and without positions
