# SPDX-License-Identifier: Apache-2.0
import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from ahcq_plugin import quantize
from ahcq_plugin.prequant.acnr import reduce_condition_number
from ahcq_plugin.ptq import Recipe, calibrate, precondition, prepare, quantizers, set_quantization
from ahcq_plugin.ptq.fold import _separate_projections, fold_bimodal_keys
from ahcq_plugin.ptq.precondition import error_grams
from ahcq_plugin.ptq.prepared import is_weight, original_weights, watched, weight_layers
from ahcq_plugin.ptq.stream import UnitStream
from ahcq_plugin.support.workers import Workers
from ahcq_plugin.zoo.sam import box_forward

FINAL_KEYS = "mask_decoder.transformer.final_attn_token_to_image.k_proj"
AHCQ = Recipe.from_config("ahcq", w_bits=4, a_bits=4, iterations=10)


def prepared(sam, recipe=AHCQ):
    prepare(sam, recipe)
    return sam


def linears(model):
    return {name: layer for name, layer in weight_layers(model).items() if isinstance(layer, nn.Linear)}


def ill_conditioned(sam):
    """The same model with one small singular value in every Linear: random weights are better than ACNR's threshold."""
    for layer in (m for m in sam.modules() if isinstance(m, nn.Linear)):
        left, values, right = torch.linalg.svd(layer.weight.data, full_matrices=False)
        values[-1] = values[0] / 1000
        layer.weight.data = left @ values.diag() @ right
    return sam


def test_nothing_of_the_provisional_calibration_survives(tiny_sam, tiny_items):
    model = prepared(ill_conditioned(tiny_sam))
    never = copy.deepcopy(model)
    reports = precondition(model, tiny_items, AHCQ, box_forward, progress=False)
    assert sum(report.after < report.before for report in reports) == len(linears(model))
    for name, layer in linears(never).items():
        layer.weight.data = model.get_submodule(name).weight.data.clone()
    for each in (model, never):
        calibrate(each, tiny_items, box_forward, progress=False)
    after, expected = model.state_dict(), never.state_dict()
    assert after.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(after[key], expected[key])] == []


def test_weights_are_those_of_the_function_on_its_own(tiny_sam, tiny_items):
    model = prepared(ill_conditioned(tiny_sam))
    before = {name: layer.weight.detach().clone() for name, layer in linears(model).items()}
    reference = copy.deepcopy(model)
    calibrate(reference, tiny_items, box_forward, progress=False)
    grams = error_grams(reference, tiny_items, box_forward, False, progress=False)
    precondition(model, tiny_items, AHCQ, box_forward, progress=False)
    for name, layer in linears(model).items():
        expected = reduce_condition_number(before[name], grams[reference.get_submodule(name)])
        assert torch.equal(layer.weight, expected)
        assert torch.equal(layer.original_weight, before[name])
    unseen = {q.role for _, q in quantizers(model) if not is_weight(q) and not int(q.activation_post_process.count)}
    assert unseen == {"softmax", "q", "k", "v", "conv_in"}  # what feeds no Linear is not calibrated for nothing


def test_local_errors_are_those_of_each_input(tiny_sam, tiny_items):
    model = prepared(tiny_sam)
    calibrate(model, tiny_items, box_forward, progress=False)
    grams = error_grams(model, tiny_items, box_forward, False, progress=False)
    assert grams.keys() == set(linears(model).values())
    name = "mask_decoder.transformer.layers.1.mlp.lin2"
    layer, seen = model.get_submodule(name), []
    (quantizer,) = [q for _, q in quantizers(model) if layer in q.consumers]
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        for item in tiny_items:
            box_forward(model, item)
    handle.remove()
    x = torch.cat(seen).double()
    error = quantizer.decode(quantizer.encode(x)).double() - x
    torch.testing.assert_close(grams[layer].double(), error.T @ error / len(x), rtol=1e-4, atol=1e-9)


def test_accumulated_errors_start_as_local_ones_and_grow(tiny_sam, tiny_items):
    model = prepared(tiny_sam)
    calibrate(model, tiny_items, box_forward, progress=False)
    local, accumulated = (error_grams(model, tiny_items, box_forward, flag, progress=False) for flag in (False, True))
    first, last = (model.get_submodule(f"image_encoder.blocks.{name}") for name in ("0.attn.qkv", "1.mlp.lin2"))
    assert torch.equal(accumulated[first], local[first])
    assert accumulated[last].trace() > 1.5 * local[last].trace()
    assert not any(q.quantizing for _, q in quantizers(model))


def test_reconstruction_aims_at_the_original_model(tiny_sam, tiny_items):
    plain = prepared(copy.deepcopy(tiny_sam))
    model = prepared(ill_conditioned(tiny_sam))
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        precondition(
            each, tiny_items, AHCQ if each is model else Recipe.from_config("rtn"), box_forward, progress=False
        )
        calibrate(each, tiny_items, box_forward, progress=False)
    stream, reference = UnitStream(model, tiny_items, box_forward), UnitStream(plain, tiny_items, box_forward)
    for name in stream.order[:2]:
        for each in (stream, reference):
            each.collect(name)
        for item in range(len(tiny_items)):
            assert torch.equal(stream.target(name, item), reference.target(name, item))
        set_quantization(model.get_submodule(name), False)
        args, kwargs = stream.inputs("floating", 0)
        assert not torch.equal(model.get_submodule(name)(*args, **kwargs), stream.target(name, 0))
        for each in (stream, reference):
            each.advance(name)


def test_original_weights_come_back_when_the_body_raises(tiny_sam, tiny_items):
    model = prepared(ill_conditioned(tiny_sam))
    precondition(model, tiny_items, AHCQ, box_forward, progress=False)
    before = {name: layer.weight.detach().clone() for name, layer in linears(model).items()}
    with pytest.raises(ZeroDivisionError), original_weights(model):
        assert not torch.equal(
            model.get_submodule("image_encoder.blocks.0.attn.qkv").weight, next(iter(before.values()))
        )
        raise ZeroDivisionError
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in before.items())


def test_the_report_has_condition_numbers_and_originals_are_freed(tiny_sam, tiny_items):
    qmodel, report = quantize(
        ill_conditioned(tiny_sam), tiny_items, "ahcq", forward=box_forward, iterations=5, progress=False
    )
    assert {line.layer for line in report.conditions} == set(linears(qmodel))
    assert all(line.before > 900 and line.after < 0.5 * line.before for line in report.conditions)
    assert all(layer.original_weight is None for layer in linears(qmodel).values())


def test_condiquant_needs_no_data(tiny_sam, tiny_items):
    recipe = Recipe.from_config("qdrop", condiquant=True)
    model = prepared(ill_conditioned(tiny_sam), recipe)
    reports = precondition(model, [None], recipe, lambda *_: pytest.fail("was called"), progress=False)
    assert all(report.after < report.before for report in reports)


def bimodal_keys(sam):
    """The final attention's keys get two modes by their bias; its queries stay."""
    attention = sam.mask_decoder.transformer.final_attn_token_to_image
    half = attention.k_proj.out_features // 2
    with torch.no_grad():
        attention.k_proj.weight *= 0.1
        attention.k_proj.bias.copy_(torch.cat([torch.full((half,), 8.0), torch.full((half,), -8.0)]))
    return sam


def test_folding_keeps_the_function_and_makes_one_mode(tiny_sam, tiny_items):
    model = prepared(bimodal_keys(tiny_sam), Recipe.from_config("ptq4sam"))
    with torch.no_grad():
        before = [box_forward(model, item) for item in tiny_items]
        assert FINAL_KEYS in fold_bimodal_keys(model, tiny_items[0], box_forward)
        for item, masks in zip(tiny_items, before, strict=True):
            for a, b in zip(box_forward(model, item), masks, strict=True):
                assert torch.equal(a, b)
    assert (model.get_submodule(FINAL_KEYS).bias > 0).all()
    assert FINAL_KEYS not in fold_bimodal_keys(model, tiny_items[0], box_forward)


def test_projections_called_again_are_only_watched_while_signs_are_judged(tiny_sam, tiny_items):
    """A video's mask decoder runs once per frame."""
    model = prepared(bimodal_keys(tiny_sam), Recipe.from_config("ptq4sam"))
    seen = []
    with torch.no_grad():
        expected = [leaf for item in tiny_items[:2] for leaf in box_forward(model, item)]
        fold_bimodal_keys(
            model, None, lambda m, _: seen.extend(leaf for item in tiny_items[:2] for leaf in box_forward(m, item))
        )
    assert not torch.equal(expected[0], expected[len(expected) // 2])
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_what_a_note_returns_does_not_replace_the_output():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    with watched({"layer": layer}, lambda name, module, given, out: -out):
        assert torch.equal(layer(x), layer.forward(x))


@dataclass(frozen=True)
class OneOfTwo(Workers):
    """A process of two that run one after the other; what the first says, the second hears."""

    size: int = 2
    said: list = field(default_factory=list)

    def first(self, value):
        if self.is_first:
            self.said.append(value)
        return self.said[0]


@pytest.mark.parametrize("first_folds", [True, False])
def test_the_first_process_decides_for_all_which_keys_are_folded(tiny_sam, tiny_items, monkeypatch, first_folds):
    """Keys near the border may be bimodal on one kind of hardware and not on another."""
    recipe = Recipe.from_config("ptq4sam")
    before = prepared(bimodal_keys(tiny_sam), recipe)
    states, first = [], OneOfTwo()
    for workers, folds in ((first, first_folds), (OneOfTwo(1, said=first.said), not first_folds)):
        monkeypatch.setattr("ahcq_plugin.ptq.fold.is_bimodal", lambda keys, folds=folds: folds)
        model = copy.deepcopy(before)
        precondition(model, tiny_items, recipe, box_forward, progress=False, workers=workers)
        states.append(model.state_dict())
    assert len(first.said) == 1
    assert [key for key, value in states[0].items() if not torch.equal(value, states[1][key])] == []
    assert torch.equal(states[1][FINAL_KEYS + ".bias"], before.state_dict()[FINAL_KEYS + ".bias"]) != first_folds


def test_a_query_with_another_reader_is_not_folded(tiny_sam):
    """The encoder's q, k, v come from one Linear, and its q feeds relative positions: nothing to fold there."""
    model = prepared(tiny_sam, Recipe.from_config("ptq4sam"))
    names = [name for name, _ in _separate_projections(model)]
    assert len(names) == 7 and all(name.startswith("mask_decoder.") for name in names)


def test_a_resumed_run_gives_the_same_model(tiny_sam, tiny_items, tmp_path):
    """With ACNR the original weights, the targets, must survive the interruption; with CAG the grouped channels."""
    recipe = {"name": "ahcq", "iterations": 10, "scale_lr": 1e-3}
    options = dict(forward=box_forward, work_dir=tmp_path, progress=False)
    first, report = quantize(ill_conditioned(tiny_sam), tiny_items, recipe, **options)
    for unit in (3, 4, 5, 6):
        (tmp_path / "units" / f"{unit:03d}.pt").unlink()
    again, resumed = quantize(tiny_sam, tiny_items, recipe, resume=True, **options)
    assert [vars(unit) | {"seconds": 0} for unit in resumed.units] == [
        vars(unit) | {"seconds": 0} for unit in report.units
    ]
    assert resumed.conditions == report.conditions
    expected = first.state_dict()
    assert [key for key, value in again.state_dict().items() if not torch.equal(value, expected[key])] == []
