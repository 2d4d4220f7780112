# SPDX-License-Identifier: Apache-2.0
"""The integer model as a whole: equal matmuls, equal codes, no float products, packed state, drop-in use."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ahcq_plugin.export.operands import SpecError
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.integer import BACKENDS, integer_unit, to_integer, use_backend
from ahcq_plugin.integer.attention import IntegerAttention, RelativePositions
from ahcq_plugin.integer.layers import EncodedLinear
from ahcq_plugin.integer.mlp import IntegerMLP
from ahcq_plugin.integer.model import MATMULS
from ahcq_plugin.integer.packed import PackedWeight
from ahcq_plugin.quantizers import FakeQuantize
from ahcq_plugin.studies.timing import unit_inputs
from ahcq_plugin.zoo.sam import box_forward
from ahcq_plugin.zoo.track import clip_forward
from tests.conftest import make_clips, make_tiny_items
from tests.integer.cases import BACKENDS as WORKING
from tests.integer.comparing import differing_codes, differing_matmuls
from tests.integer.conftest import quantized_sam, quantized_sam2

ITEMS = make_tiny_items()
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product", "linear", "dot", "mv")


def inputs_of(model: nn.Module) -> dict[str, tuple]:
    """Positional arguments of every unit in one run of the fake-quantized model."""
    seen = unit_inputs(model, ITEMS[1], list(prepared_units(model)), box_forward)
    arguments = {}
    for name, (args, kwargs) in seen.items():
        names = [n.target for n in model.get_submodule(name).graph.nodes if n.op == "placeholder"]
        arguments[name] = (*args, *(kwargs[n] for n in names if n in kwargs))
    return arguments


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize(("recipe", "bits"), [("ahcq", 4), ("rtn", 8), ("ptq4sam", 6)])
def test_every_matmul_of_sam_equals_the_golden_model(backend, recipe, bits) -> None:
    qmodel = quantized_sam(recipe, bits)
    compared, wrong = differing_matmuls(qmodel, to_integer(qmodel), ITEMS[1:], box_forward, backend)
    assert compared == 2 * 60 and not wrong, wrong


def test_every_matmul_of_sam2_equals_the_golden_model() -> None:
    qmodel = quantized_sam2()
    compared, wrong = differing_matmuls(qmodel, to_integer(qmodel), make_clips(1), clip_forward, WORKING[0])
    assert compared > 300 and not wrong, wrong


@pytest.mark.parametrize(("recipe", "bits"), [("ahcq", 4), ("rtn", 8), ("ptq4sam", 6)])
def test_codes_differ_only_at_boundaries(recipe, bits, monkeypatch) -> None:
    qmodel = quantized_sam(recipe, bits)
    integer, arguments = to_integer(qmodel), inputs_of(qmodel)
    compared = 0
    for name, unit in prepared_units(qmodel).items():
        count, problems = differing_codes(unit, integer.get_submodule(name), arguments[name], monkeypatch)
        compared += count
        assert not problems, (name, problems)
    assert compared > 50_000


def test_a_wrong_zero_point_is_caught(qmodel, monkeypatch) -> None:
    """Planted in the keys of one block: neither equal matmuls nor equal codes any more."""
    name = "image_encoder.blocks.1"
    wrong = copy.deepcopy(qmodel)
    keys = next(m for m in wrong.get_submodule(name).modules() if isinstance(m, FakeQuantize) and m.role == "k")
    keys.zero_point += 1 if int(keys.zero_point) < keys.quant_max else -1
    integer = to_integer(wrong)
    _, matmuls = differing_matmuls(qmodel, integer, ITEMS[1:2], box_forward, WORKING[0])
    assert [m.rpartition(".")[0] for m in matmuls] == [name]
    unit, arguments = qmodel.get_submodule(name), inputs_of(qmodel)[name]
    _, codes = differing_codes(unit, integer.get_submodule(name), arguments, monkeypatch)
    assert codes


@pytest.mark.parametrize("backend", WORKING)
def test_masks_are_those_of_the_fake_quantized_model(qmodel, integer, backend) -> None:
    with torch.no_grad(), use_backend(backend):
        for item in ITEMS:
            wanted, found = box_forward(qmodel, item), box_forward(integer, item)
            for a, b in zip(found, wanted, strict=True):
                assert float((a - b).norm() / b.norm()) < 1e-4
    assert not any(isinstance(m, FakeQuantize) for m in integer.modules())


class _FloatProducts(TorchDispatchMode):
    """Notes products of matrices in floating point, but those within relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.excepted, self.inside = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name.startswith(PRODUCTS) and any(isinstance(a, torch.Tensor) and a.is_floating_point() for a in args):
            if self.inside:
                self.excepted += 1
            else:
                self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", WORKING)
def test_units_multiply_no_matrices_in_floating_point(qmodel, integer, backend) -> None:
    counter = _FloatProducts()
    handles = []
    for module in integer.modules():
        if isinstance(module, RelativePositions):
            handles.append(module.register_forward_pre_hook(lambda *_: setattr(counter, "inside", True)))
            handles.append(module.register_forward_hook(lambda *_: setattr(counter, "inside", False)))
    arguments = inputs_of(qmodel)
    with torch.no_grad(), use_backend(backend), counter:
        for name, args in arguments.items():
            integer.get_submodule(name)(*args)
    for handle in handles:
        handle.remove()
    assert not counter.found, counter.found
    assert counter.excepted == 2 * 2  # rows and columns of two blocks
    with torch.no_grad(), _FloatProducts() as plain:  # the counter sees what the fake-quantized unit multiplies
        qmodel.get_submodule("image_encoder.blocks.0")(*arguments["image_encoder.blocks.0"])
    assert len(plain.found) >= 6


def test_attention_and_mlps_are_computed_by_blocks(integer) -> None:
    kinds = [type(m) for m in integer.modules()]
    assert kinds.count(IntegerAttention) == 2 + 2 * 3 + 1 and kinds.count(IntegerMLP) == 2 + 2
    assert kinds.count(EncodedLinear) == 2 + 3 * 2 * 3 + 3  # qkv of the encoder; q, k and v of the decoder


@pytest.mark.parametrize("backend", WORKING)
def test_tiles_of_queries_change_nothing(qmodel, integer, backend, monkeypatch) -> None:
    name = "image_encoder.blocks.1"
    args = inputs_of(qmodel)[name]
    with use_backend(backend), torch.no_grad():
        whole = integer.get_submodule(name)(*args)
        monkeypatch.setattr("ahcq_plugin.integer.backends.base.TILE_SCORES", 200)
        monkeypatch.setattr("ahcq_plugin.integer.mlp.BLOCK", 300)
        assert torch.equal(integer.get_submodule(name)(*args), whole)


def test_the_state_holds_packed_codes_and_no_weights(qmodel, integer) -> None:
    state = integer.state_dict()
    for name, unit in prepared_units(qmodel).items():
        for key, tensor in integer.get_submodule(name).state_dict().items():
            is_table = "rel_pos" in key
            assert not tensor.is_floating_point() or tensor.squeeze().ndim <= 1 or is_table, (name, key)
        for node, module in integer.get_submodule(name).meta[MATMULS].items():
            if hasattr(module, "weight"):
                layer = unit.get_submodule(next(n.target for n in unit.graph.nodes if n.name == node))
                assert module.weight.packed.numel() == -(-layer.weight.numel() * 4 // 8)
    fresh = to_integer(qmodel)
    for tensor in fresh.state_dict().values():
        tensor.zero_()
    fresh.load_state_dict(state)
    with torch.no_grad():
        for a, b in zip(box_forward(fresh, ITEMS[0]), box_forward(integer, ITEMS[0]), strict=True):
            assert torch.equal(a, b)


def test_low_memory_keeps_packed_codes_alone(qmodel, integer) -> None:
    low = to_integer(qmodel, memory="low")
    with torch.no_grad():
        for a, b in zip(box_forward(low, ITEMS[0]), box_forward(integer, ITEMS[0]), strict=True):
            assert torch.equal(a, b)
    weights = [m for m in low.modules() if isinstance(m, PackedWeight)]
    assert weights and not any(weight._forms for weight in weights)
    assert any(m._forms for m in integer.modules() if isinstance(m, PackedWeight))


def test_the_model_given_is_not_changed_and_shares_nothing(qmodel) -> None:
    before = {name: tensor.clone() for name, tensor in qmodel.state_dict().items()}
    integer = to_integer(qmodel)
    for tensor in integer.state_dict().values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in qmodel.state_dict().items())
    assert not any(p.requires_grad for p in integer.parameters())


def test_copies_compute_the_same(integer) -> None:
    twin = copy.deepcopy(integer)
    with torch.no_grad():
        for a, b in zip(box_forward(twin, ITEMS[0]), box_forward(integer, ITEMS[0]), strict=True):
            assert torch.equal(a, b)


def test_compiled_units_compute_the_same(qmodel, integer) -> None:
    name = "image_encoder.blocks.0"
    args, unit = inputs_of(qmodel)[name], integer.get_submodule(name)
    with torch.no_grad():
        assert torch.equal(torch.compile(unit, backend="aot_eager")(*args), unit(*args))


def test_predictors_take_it(qmodel, integer) -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    logits = []
    for model in (qmodel, integer):
        predictor = SamPredictor(model)
        predictor.set_image(image)
        logits.append(predictor.predict(box=np.array([5, 5, 40, 40]), multimask_output=True, return_logits=True)[0])
    assert np.abs(logits[0] - logits[1]).max() < 1e-3 * np.abs(logits[0]).max()
    made = SamAutomaticMaskGenerator(
        integer, points_per_side=2, pred_iou_thresh=-100.0, stability_score_thresh=0.0
    ).generate(image)
    assert isinstance(made, list)


def test_videos_are_tracked_by_it() -> None:
    qmodel, clip = quantized_sam2(), make_clips(1)[0]
    with torch.no_grad():
        wanted, found = clip_forward(qmodel, clip), clip_forward(to_integer(qmodel), clip)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3


def test_wrong_arguments_are_refused(qmodel) -> None:
    with pytest.raises(ValueError, match="`memory` must be one of fast, low"):
        to_integer(qmodel, memory="high")
    with pytest.raises(ValueError, match="no quantized unit"):
        to_integer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unknown backend 'gpu'; allowed: " + ", ".join(BACKENDS)), use_backend("gpu"):
        pass
    unit = copy.deepcopy(qmodel.get_submodule("image_encoder.blocks.0"))
    next(m for m in unit.modules() if isinstance(m, FakeQuantize)).enable_fake_quant(False)
    with pytest.raises(SpecError, match="not frozen"):
        integer_unit(unit, "block")
