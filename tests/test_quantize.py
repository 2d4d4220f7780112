# SPDX-License-Identifier: Apache-2.0
import inspect
import json

import pytest
import timm
import torch
from torch import nn

from ahcq_plugin import quantize
from ahcq_plugin.ptq import AuditError, audit, calibrate, quantizers
from ahcq_plugin.ptq.checkpoint import CALIBRATED_FILE
from ahcq_plugin.ptq.prepare import prepare
from ahcq_plugin.ptq.prepared import activation_quantizers, observing, set_quantization, weight_layers
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.support.safe_load import safe_load
from ahcq_plugin.zoo.sam import box_forward


def test_sam_by_one_call(tiny_sam, tiny_items):
    before = {key: value.clone() for key, value in tiny_sam.state_dict().items()}
    qmodel, report = quantize(tiny_sam, tiny_items, "qdrop", 8, 8, forward=box_forward, iterations=3, progress=False)
    assert tiny_sam.state_dict().keys() == before.keys()
    assert all(torch.equal(tiny_sam.state_dict()[key], before[key]) for key in before)
    assert report.audit.passed and len(report.units) == 6
    assert set(report.stages) == {"prepare", "precondition", "calibrate", "reconstruct", "freeze", "audit"}
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["recipe"]["w_bits"] == 8 and plain["audit"]["counts"]["softmax"] > 0
    with torch.no_grad():
        for item in tiny_items:
            masks, reference = box_forward(qmodel, item)[0], box_forward(tiny_sam, item)[0]
            assert (masks - reference).norm() < 0.1 * reference.norm()


@pytest.mark.slow
def test_more_bits_less_error(tiny_sam, tiny_items):
    with torch.no_grad():
        reference = box_forward(tiny_sam, tiny_items[2])[0]
        errors = []
        for bits in (3, 4, 6, 8):
            qmodel, _ = quantize(tiny_sam, tiny_items, "rtn", bits, bits, forward=box_forward, progress=False)
            errors.append((box_forward(qmodel, tiny_items[2])[0] - reference).norm().item())
    assert errors == sorted(errors, reverse=True)


def test_timm_vit():
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2).eval()
    batches = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    qmodel, report = quantize(model, batches, "qdrop", 8, 8, iterations=2, progress=False)
    assert [unit.name for unit in report.units] == ["blocks.0", "blocks.1"] and report.audit.passed
    with torch.no_grad():
        reference, out = model(batches[0]), qmodel(batches[0])
    assert 0 < (out - reference).norm() < 0.1 * reference.norm()


def test_prepared_model_computes_floating_point_until_switched_on(tiny_sam, tiny_items):
    with torch.no_grad():
        reference = box_forward(tiny_sam, tiny_items[1])
        prepare(tiny_sam, Recipe.from_config("rtn"))
        calibrate(tiny_sam, tiny_items, box_forward, progress=False)
        for a, b in zip(box_forward(tiny_sam, tiny_items[1]), reference, strict=True):
            assert torch.equal(a, b)
        set_quantization(tiny_sam, True)
        assert not torch.equal(box_forward(tiny_sam, tiny_items[1])[0], reference[0])


def test_failed_calibration_commits_nothing_and_restores_modes(tiny_sam, tiny_items):
    prepare(tiny_sam, Recipe.from_config("rtn"))
    calibrate(tiny_sam, tiny_items, box_forward, progress=False)
    scales = {n: q.scale.clone() for n, q in quantizers(tiny_sam)}
    observed = [quantizer for _, quantizer in activation_quantizers(tiny_sam)]
    with pytest.raises(ZeroDivisionError), observing(tiny_sam, observed):
        box_forward(tiny_sam, {**tiny_items[0], "image": tiny_items[0]["image"] * 100})
        raise ZeroDivisionError
    for name, quantizer in quantizers(tiny_sam):
        assert torch.equal(quantizer.scale, scales[name]) and not quantizer.observing and not quantizer.quantizing


def test_calibrating_again_starts_afresh(tiny_sam, tiny_items):
    prepare(tiny_sam, Recipe.from_config("rtn"))
    calibrate(tiny_sam, [{**item, "image": item["image"] * 50} for item in tiny_items], box_forward, progress=False)
    calibrate(tiny_sam, tiny_items, box_forward, progress=False)
    again = {n: q.scale.clone() for n, q in quantizers(tiny_sam)}
    calibrate(tiny_sam, tiny_items, box_forward, progress=False)
    assert all(torch.equal(q.scale, again[n]) for n, q in quantizers(tiny_sam))


def test_a_failed_audit_raises_with_all_problems(tiny_sam, tiny_items, monkeypatch):
    monkeypatch.setattr("ahcq_plugin.api.freeze", lambda model: model)
    with pytest.raises(AuditError, match=r"the audit failed with \d+ problems; no result is reported:\n  .*off"):
        quantize(tiny_sam, tiny_items, "rtn", forward=box_forward, progress=False)


class ByKeyword(nn.Module):
    """An MLP that calls its layers by keyword, as some models do."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(input=nn.functional.gelu(self.up(input=self.norm(x))))


@pytest.mark.parametrize("recipe", ["adaround", "brecq"])
def test_layers_called_by_keyword(recipe):
    torch.manual_seed(0)
    model, batches = nn.Sequential(ByKeyword(), ByKeyword()), [torch.randn(2, 5, 8) for _ in range(2)]
    _, report = quantize(model, batches, recipe, 8, 8, units=ByKeyword, iterations=2, progress=False)
    assert [unit.name for unit in report.units] == ["0", "1"] and report.audit.passed


def test_the_default_recipe_is_the_papers():
    assert inspect.signature(quantize).parameters["recipe"].default == "ahcq"


def test_the_report_has_the_weights_that_were_calibrated(tiny_sam, tiny_items, tmp_path):
    recipe = {"name": "rtn", "acnr": True}
    qmodel, report = quantize(tiny_sam, tiny_items, recipe, forward=box_forward, work_dir=tmp_path, progress=False)
    assert set(report.unrounded) == {f"{name}.weight" for name in weight_layers(qmodel)}
    calibrated, rounded = safe_load(tmp_path / CALIBRATED_FILE)["state"], qmodel.state_dict()
    for name, weight in report.unrounded.items():
        assert torch.equal(weight, calibrated[name]) and not torch.equal(weight, rounded[name]), name
    assert "unrounded" not in report.to_dict()
    again = quantize(tiny_sam, tiny_items, recipe, forward=box_forward, work_dir=tmp_path, resume=True, progress=False)
    assert all(torch.equal(weight, report.unrounded[name]) for name, weight in again[1].unrounded.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "the model or the data changed"),
        ({"w_bits": 5}, r"the recipe changed \(w_bits\)"),
        ({"w_bits": 5, "a_bits": 5}, r"the recipe changed \(a_bits, w_bits\)"),
    ],
)
def test_a_resume_blames_only_settings_that_determine_the_result(tiny_sam, tiny_items, tmp_path, change, message):
    def run(recipe, items, resume):
        quantize(tiny_sam, items, recipe, forward=box_forward, work_dir=tmp_path, resume=resume, progress=False)

    run("rtn", tiny_items, False)
    run({"name": "rtn", "cache_device": "disk"}, tiny_items, True)
    with pytest.raises(ValueError, match=rf"cannot resume from .*: {message}; use a new work dir"):
        run({"name": "rtn", "cache_device": "disk", **change}, tiny_items[1:], True)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"recipe": "awq"}, ValueError, "unknown recipe 'awq'"),
        ({"w_bits": 1}, ValueError, r"`w_bits` must be in \[2, 8\], got 1"),
        ({"batches": []}, ValueError, "`batches` is empty"),
        ({"batches": iter([1])}, TypeError, r"`batches` must be a sequence .* wrap it in list\(...\)"),
        ({"units": "blocks.*"}, ValueError, r"blocks\.\*"),
        ({"resume": True}, ValueError, "`resume=True` needs `work_dir`"),
        ({"batches": [None]}, ValueError, r"`batches\[0\]` does not go through `forward` \(TypeError: "),
        ({"forward": lambda model, item: model(item)}, ValueError, "does not go through `forward`"),
        ({"forward": lambda model, item: None}, ValueError, "`forward` returned None"),
        ({"notes": {"of": [{"x": object()}]}}, TypeError, r"notes\['of'\]\[0\]\['x'\] is a object"),
    ],
)
def test_bad_arguments(tiny_sam, tiny_items, change, error, message):
    arguments = {"batches": tiny_items, "recipe": "rtn", "forward": box_forward, "progress": False, **change}
    with pytest.raises(error, match=message):
        quantize(tiny_sam, **arguments)


def test_a_model_without_blocks():
    with pytest.raises(ValueError, match="units="):
        quantize(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), [torch.randn(2, 4)], "rtn", progress=False)


def test_a_prepared_model_is_refused(tiny_sam, tiny_items):
    qmodel, _ = quantize(tiny_sam, tiny_items, "rtn", forward=box_forward, progress=False)
    with pytest.raises(ValueError, match="already prepared"):
        quantize(qmodel, tiny_items, "rtn", forward=box_forward, progress=False)
    assert audit(qmodel, tiny_items[0], box_forward).passed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_before_anything_is_computed(tiny_sam, tiny_items, value):
    with torch.no_grad():
        tiny_sam.mask_decoder.iou_token.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"NaN or infinite values in 1 tensors, first mask_decoder\.iou_token\.weight"):
        quantize(tiny_sam, tiny_items, "rtn", forward=lambda *_: pytest.fail("computed"), progress=False)


def test_nan_in_the_first_item_is_named_before_anything_else(tiny_sam, tiny_items):
    item = {**tiny_items[0], "image": tiny_items[0]["image"] * float("nan")}
    with pytest.raises(ValueError, match=r"`batches\[0\]`\['image'\] holds NaN"):
        quantize(tiny_sam, [item, *tiny_items], "rtn", forward=box_forward, progress=False)


def test_nan_that_the_model_makes_is_named(tiny_sam, tiny_items):
    with pytest.raises(ValueError, match="the model's output for `batches.0.` holds NaN before anything is quantized"):
        quantize(tiny_sam, tiny_items, "rtn", progress=False, forward=lambda m, x: box_forward(m, x)[0] * float("nan"))
