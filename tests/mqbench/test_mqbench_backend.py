# SPDX-License-Identifier: Apache-2.0
"""``prepare_by_platform`` with our backend: the placement and the numbers of our own ``prepare``."""

import logging

import pytest
import torch

pytest.importorskip("mqbench.prepare_by_platform", reason="needs MQBench, see docs/mqbench.md", exc_type=ImportError)

from mqbench.prepare_by_platform import prepare_by_platform
from mqbench.utils.state import disable_all, enable_calibration, enable_quantization
from segment_anything.modeling.image_encoder import Block
from segment_anything.modeling.transformer import TwoWayAttentionBlock

from ahcq_plugin import ptq
from ahcq_plugin.graph import BlockTracer, describe, trace_unit
from ahcq_plugin.mqbench import ACNR, AHCQ_BACKEND, calibrate, recipe_of
from ahcq_plugin.mqbench import prepare as prepare_blocks
from ahcq_plugin.ptq import Recipe
from ahcq_plugin.support.batches import default_forward
from ahcq_plugin.zoo.sam import box_forward
from tests.mqbench.models import FusedAttention, ViT, build, clone, patches, relative_error


def sam_block():
    block = Block(32, 2, 2.0, use_rel_pos=True, window_size=3, input_size=(3, 3))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return block


def two_way_block():
    return TwoWayAttentionBlock(32, 2, mlp_dim=64)


def two_way_items():
    shapes = [(2, 7, 32), (2, 16, 32), (2, 7, 32), (2, 16, 32)]
    generator = torch.Generator().manual_seed(2)
    return [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(3)]


BLOCKS = {"Block": (sam_block, lambda: patches(3, shape=(7, 7, 32))), "TwoWay": (two_way_block, two_way_items)}


def by_platform(block, **extra):
    return prepare_by_platform(
        clone(block), AHCQ_BACKEND, {"extra_quantizer_dict": extra}, custom_tracer=BlockTracer()
    ).eval()


def natively(block, recipe="ahcq"):
    return ptq.prepare_unit(trace_unit(clone(block), ""), Recipe.from_config(recipe))


def assert_equal_states(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("recipe", ["ahcq", "ptq4sam"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_sam_block_is_prepared_and_calibrated_as_natively(kind, recipe):
    make, items = BLOCKS[kind]
    block, items = build(make), items()
    native, hosted = natively(block, recipe), by_platform(block, recipe=recipe, prequant=[])
    rows = describe(native).rows
    assert [row.role for row in rows] and describe(hosted).rows == rows
    for model in (native, hosted):
        ptq.calibrate(model, items, progress=False)
    assert_equal_states(native, hosted)
    ptq.freeze(native), ptq.freeze(hosted)
    assert_equal_states(native, hosted)
    for item in items:
        ours, theirs = default_forward(native, item), default_forward(hosted, item)
        for a, b in zip(*((out if isinstance(out, tuple) else (out,)) for out in (ours, theirs)), strict=True):
            assert torch.equal(a, b)
    assert ptq.audit(hosted, items[0]).problems == []


def test_a_whole_sam_is_prepared_and_calibrated_as_natively(tiny_sam, tiny_items):
    other = clone(tiny_sam)
    ptq.prepare(tiny_sam, Recipe.from_config("ahcq"))
    prepare_blocks(other, "ahcq")
    assert describe(other).rows == describe(tiny_sam).rows
    for model in (tiny_sam, other):
        ptq.calibrate(model, tiny_items, box_forward, progress=False)
    assert_equal_states(tiny_sam, other)
    with torch.no_grad():
        for model in (tiny_sam, other):
            ptq.freeze(model)
        assert torch.equal(box_forward(tiny_sam, tiny_items[0])[0], box_forward(other, tiny_items[0])[0])


def test_mqbenchs_own_calibration_finds_what_ours_finds_where_nothing_is_searched():
    block, items = build(sam_block), BLOCKS["Block"][1]()
    hosted = by_platform(block, recipe={"name": "ahcq", "hluq": False, "lnq": False, "acnr": False})
    other = by_platform(block, recipe={"name": "ahcq", "hluq": False, "lnq": False, "acnr": False})
    enable_calibration(hosted)
    with torch.no_grad():
        for item in items:
            hosted(item)
    enable_quantization(hosted)
    calibrate(other, items, progress=False)
    enable_quantization(other)
    with torch.no_grad():
        assert torch.equal(hosted(items[0]), other(items[0]))


def test_a_searching_calibration_sees_what_follows():
    """HLUQ and LNQ by the error of the following Linear and of A·V, so that the block's error is lower."""
    vit, data = build(ViT), patches()
    blind, seeing = (by_platform(vit, recipe={"name": "ahcq", "a_bits": 3, "w_bits": 8}, prequant=[]) for _ in range(2))
    enable_calibration(blind)
    with torch.no_grad():
        for x in data:
            blind(x)
    calibrate(seeing, data, progress=False)
    different = []
    for model in (blind, seeing):
        enable_quantization(model)
    for (_, a), (_, b) in zip(ptq.quantizers(blind), ptq.quantizers(seeing), strict=True):
        if not all(torch.equal(a.state_dict()[key], b.state_dict()[key]) for key in a.state_dict()):
            different.append(a.family)
    assert set(different) <= {"hluq", "lnq"} and different


def test_mqbenchs_own_tracer_gives_the_same_table():
    vit = build(ViT, FusedAttention)
    plain = prepare_by_platform(clone(vit), AHCQ_BACKEND, {"extra_quantizer_dict": {"prequant": []}}).eval()
    ours = by_platform(vit, prequant=[])
    assert [(r.node, r.role, r.quantizer) for r in describe(plain)] == [
        (r.node, r.role, r.quantizer) for r in describe(ours)
    ]
    assert {"qkv_in", "q", "k", "v", "softmax", "attn_out", "mlp_in", "post_act"} <= {r.role for r in describe(ours)}


def test_prepared_but_switched_off_it_computes_floating_point():
    vit = build(ViT)
    hosted = by_platform(vit, prequant=[])
    calibrate(hosted, patches(), progress=False)
    enable_quantization(hosted)
    assert relative_error(hosted, vit, patches()) > 0
    disable_all(hosted)
    assert relative_error(hosted, vit, patches()) == 0


def badly_conditioned_vit():
    vit = build(ViT)
    with torch.no_grad():
        weight = vit.get_submodule("blocks.0.fc1").weight
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        s[-8:] *= 1e-4
        weight.copy_(u @ torch.diag(s) @ v)
    return vit


def test_acnr_is_a_prequant_hook_and_equals_the_engines():
    vit, data = badly_conditioned_vit(), patches()
    hooked = by_platform(vit, recipe="ahcq", prequant=[ACNR(data)])
    called = by_platform(vit, recipe="ahcq", prequant=[])
    reports = {row.layer: row for row in ACNR(data)(called)}
    assert reports["blocks.0.fc1"].before > 1000 > reports["blocks.0.fc1"].after
    native = natively(vit)
    ptq.precondition(native, data, Recipe.from_config("ahcq"), progress=False)
    for name, value in vit.state_dict().items():
        for other in (hooked, called):
            assert torch.equal(other.state_dict()[name], native.state_dict()[name]), name
        if name == "blocks.0.fc1.weight":
            assert not torch.equal(hooked.state_dict()[name], value)
    layer = hooked.get_submodule("blocks.0.fc1")
    assert torch.equal(layer.original_weight, vit.get_submodule("blocks.0.fc1").weight)
    for model in (hooked, native):
        ptq.calibrate(model, data, progress=False)
    assert_equal_states(hooked, native)  # nothing of the provisional calibration stays


def test_after_acnr_mqbenchs_own_calibration_starts_afresh():
    vit, data = badly_conditioned_vit(), patches()
    recipe = {"name": "ahcq", "hluq": False, "lnq": False}
    hosted, ours = (by_platform(vit, recipe=recipe, prequant=[ACNR([x * 9 for x in data])]) for _ in range(2))
    enable_calibration(hosted)
    with torch.no_grad():
        for x in data:
            hosted(x)
    calibrate(ours, data, progress=False)
    for model in (hosted, ours):
        enable_quantization(model)
    assert relative_error(hosted, ours, data) == 0


def test_hooks_run_in_order_on_the_prepared_module():
    seen = []
    hooks = [lambda m: seen.append((1, len(list(ptq.quantizers(m))))), lambda m: seen.append((2, recipe_of(m).name))]
    by_platform(build(ViT), recipe="qdrop", prequant=hooks)
    assert [number for number, _ in seen] == [1, 2] and seen[0][1] > 10 and seen[1][1] == "qdrop"


def test_a_recipe_with_acnr_says_that_it_needs_data(caplog):
    with caplog.at_level(logging.WARNING):
        by_platform(build(ViT), recipe="ahcq")
    assert "give extra_quantizer_dict={'prequant': [ACNR(cali_data)]}" in caplog.text
    caplog.clear()
    by_platform(build(ViT), recipe="qdrop")
    by_platform(build(ViT), recipe="ahcq", prequant=[])
    assert not caplog.text


@pytest.mark.parametrize(
    "config, message",
    [
        ({"extra_quantizer_dict": {"recipe": "awq"}}, "unknown recipe 'awq'; allowed: rtn, adaround"),
        ({"extra_quantizer_dict": {"recipe": {"name": "ahcq", "bits": 4}}}, "recipe: unknown key 'bits'"),
        ({"extra_quantizer_dict": {"exclude_module_name": ["head"]}}, "unknown key 'exclude_module_name' .* allowed: "),
        ({"extra_quantizer_dict": {"prequant": print}}, "`prequant` must be a list of functions"),
        ({"extra_quantizer_dict": {"prequant": ["acnr"]}}, "`prequant` must be a list of functions"),
        ({"extra_fuse_dict": {"additional_fusion_pattern": {}}}, "fuses nothing"),
        ({"extra_qconfig_dict": {"a_fakequantize": "HLUQFakeQuantize"}}, "extra_qconfig_dict is not read"),
        ({"extra_qconfig_dict": {"w_qscheme": dict(bit=8, symmetry=False)}}, "extra_qconfig_dict is not read"),
        ({"extra_qconfig_dict": {"a_observer_extra_args": {"ema_ratio": 1}}}, "extra_qconfig_dict is not read"),
    ],
)
def test_bad_settings(config, message):
    with pytest.raises(ValueError, match=message):
        prepare_by_platform(build(ViT), AHCQ_BACKEND, config, custom_tracer=BlockTracer())
    prepare_by_platform(build(ViT), AHCQ_BACKEND, {}, custom_tracer=BlockTracer())  # and nothing of it stays


def test_a_model_of_another_backend_has_no_recipe():
    with pytest.raises(ValueError, match="the model was not prepared for backend 'AHCQ'"):
        recipe_of(build(ViT))


def test_blocks_prepared_with_different_recipes_are_refused(tiny_sam):
    prepare_blocks(tiny_sam, "ahcq", units="image_encoder.blocks.0")
    tiny_sam.image_encoder.blocks[1] = by_platform(tiny_sam.image_encoder.blocks[1], recipe="qdrop")
    with pytest.raises(ValueError, match="different recipes"):
        recipe_of(tiny_sam)
