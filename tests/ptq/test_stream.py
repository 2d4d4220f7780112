# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq import Recipe, calibrate, prepare, set_quantization
from ahcq_plugin.ptq.stream import UnitStream
from ahcq_plugin.zoo.sam import box_forward

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


def test_unit_called_twice_is_refused(prepared, tiny_items):
    def twice(model, item):
        model.image_encoder(item["image"])
        return box_forward(model, item)

    with pytest.raises(RuntimeError, match=r"unit 'image_encoder.blocks.0' is called more than once in one forward"):
        UnitStream(prepared, tiny_items, twice)


def test_unit_never_called_is_refused(prepared, tiny_items):
    with pytest.raises(RuntimeError, match=r"never calls unit 'mask_decoder.transformer.layers.0'; leave it out"):
        UnitStream(prepared, tiny_items, lambda model, item: model.image_encoder(item["image"]))
