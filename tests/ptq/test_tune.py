# SPDX-License-Identifier: Apache-2.0
import copy
import sys

import numpy as np
import pytest
import torch
from torch import nn

from ahcq_plugin import load_quantized, quantize, save_quantized
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq import Recipe, ResumeError, audit, calibrate, floating_outputs, freeze, prepare, quantizers, tune
from ahcq_plugin.ptq.loss import mask_error, model_error
from ahcq_plugin.ptq.prepared import activation_quantizers, is_weight, set_quantization, weight_layers
from ahcq_plugin.support.batches import default_forward
from ahcq_plugin.zoo.sam import box_forward
from tests.conftest import computing_state
from tests.ptq.standins import DIM, Block

RECIPE = {"name": "rtn", "w_bits": 4, "a_bits": 4, "cag": True, "hluq": True}
TUNED = {**RECIPE, "tune_steps": 10, "tune_lr": 3e-3, "tune_scale_lr": 1e-3}


def frozen(model, items, recipe, forward=box_forward):
    """The model frozen, and its floating-point outputs."""
    prepare(model, recipe)
    targets = floating_outputs(model, items, forward, progress=False)
    calibrate(model, items, forward, progress=False)
    return freeze(model), targets


def test_the_mask_error_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    logits, wanted = (torch.randn(3, 2, 5, 4, generator=generator) * 3 for _ in range(2))
    quality, aim = (torch.rand(3, 2, generator=generator) for _ in range(2))
    z, t = logits.double().numpy(), 1 / (1 + np.exp(-wanted.double().numpy()))
    p = 1 / (1 + np.exp(-z))
    cross = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    dice = 1 - (2 * (p * t).sum((2, 3)) + 1) / ((p**2 + t**2).sum((2, 3)) + 1)
    expected = cross + dice.mean() + ((quality - aim).double().numpy() ** 2).mean()
    assert float(model_error((logits, quality), (wanted, aim))) == pytest.approx(expected, rel=1e-5)
    assert float(mask_error(logits, wanted)) == pytest.approx(cross + dice.mean(), rel=1e-5)
    none = torch.zeros(0, 1, 4, 4), torch.zeros(0, 1)
    assert float(model_error(none, none)) == 0.0


def test_outputs_that_are_no_masks_are_compared_by_their_squares():
    target = {"a": torch.tensor([3.0, 4.0]), "flag": torch.tensor([True]), "b": torch.tensor([[2.0]])}
    out = {"a": torch.tensor([3.0, 5.0]), "flag": torch.tensor([False]), "b": torch.tensor([[4.0]])}
    assert float(model_error(out, target)) == pytest.approx(1 / 25 + 4 / 4)
    maps = torch.ones(2, 1, 3, 3), torch.ones(3, 1)  # a pair of floats, but no quality of each mask
    assert float(model_error((2 * maps[0], maps[1]), maps)) == pytest.approx(1.0)


def test_tuning_lowers_the_loss_and_leaves_codes_frozen(tiny_sam, tiny_items):
    recipe = Recipe.from_config(TUNED)
    model, targets = frozen(tiny_sam, tiny_items, recipe)
    for item, (masks, quality) in zip(tiny_items, targets, strict=True):
        assert masks.shape[0] == quality.shape[0] == len(item["boxes"])
    weights = {name: layer.weight.detach().clone() for name, layer in weight_layers(model).items()}
    before, flags = copy.deepcopy(model.state_dict()), {n: p.requires_grad for n, p in model.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    report = tune(model, tiny_items, targets, recipe, box_forward, progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert report.steps == 10 and report.loss_after < report.loss_before
    assert audit(model, tiny_items[0], box_forward, recipe).passed
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in weight_layers(model).items())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    scales = {f"{name}.scale" for name, q in activation_quantizers(model) if q.learnable_scales()}
    vectors = {name for name, p in model.named_parameters() if p.ndim == 1 and name not in scales}
    inside = tuple(f"{unit}." for unit in prepared_units(model))
    tuned = scales | {name for name in vectors if name.startswith(inside)}
    assert changed <= tuned and report.values == sum(model.get_parameter(name).numel() for name in tuned)
    assert {name.rpartition(".")[2] for name in changed} == {"scale", "bias", "weight"}
    for name in scales:
        scale = model.get_parameter(name)
        assert scale.dtype == torch.float32 and bool((scale > 0).all())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())


class Blocks(nn.Module):
    """A model without masks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def small_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, width = Blocks(), DIM
        return model.eval(), [(torch.randn(2, 5, width),) for _ in range(4)]


TRIED = 1  # calls of a loss before all work, to see that it is one


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_to_equal_bits(tmp_path, monkeypatch):
    """Killed in the eighth step, the state of the sixth on disk: the tensors of an uninterrupted run."""
    monkeypatch.setattr(sys.modules["ahcq_plugin.ptq.tune"], "KEPT_EVERY", 3)
    model, items = small_model()
    calls = []

    def dying(out, target):
        calls.append(1)
        if len(calls) == TRIED + len(items) + 8:
            raise Killed
        return model_error(out, target)

    def run(folder, loss=None, resume=False):
        return quantize(model, items, TUNED, work_dir=folder, resume=resume, loss=loss, progress=False)

    whole, report = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "broken", dying)
    calls.clear()
    counted = lambda out, target: calls.append(1) or model_error(out, target)  # noqa: E731
    resumed, again = run(tmp_path / "broken", counted, resume=True)
    assert len(calls) == TRIED + 2 * len(items) + TUNED["tune_steps"] - 6
    state, expected = resumed.state_dict(), whole.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    assert (again.tuning.loss_before, again.tuning.loss_after) == (report.tuning.loss_before, report.tuning.loss_after)
    assert report.to_dict()["tuning"]["steps"] == TUNED["tune_steps"] and "tune" in report.stages

    save_quantized(resumed, tmp_path / "packed.safetensors", report=again)
    loaded = load_quantized(tmp_path / "packed.safetensors", lambda _: Blocks().eval())
    kept = computing_state(resumed)
    assert all(torch.equal(value, kept[name]) for name, value in computing_state(loaded).items())


def test_a_fresh_run_forgets_the_state_of_an_earlier_one(tmp_path):
    model, items = small_model()
    calls = []

    def dying(out, target):
        calls.append(1)
        if len(calls) > TRIED:
            raise Killed
        return model_error(out, target)

    def run(seed, **options):
        config = {**TUNED, "tune_steps": 1, "seed": seed}
        return quantize(model, items, config, work_dir=tmp_path, progress=False, **options)

    run(0)
    with pytest.raises(Killed):
        run(1, loss=dying)
    assert run(1, resume=True)[1].tuning.steps == 1


def test_the_state_of_another_run_is_refused(tmp_path):
    recipe = Recipe.from_config(TUNED, tune_steps=1)
    model, items = small_model()
    model, targets = frozen(model, items, recipe, default_forward)
    other = copy.deepcopy(model)
    tune(model, items, targets, recipe, work_dir=tmp_path, progress=False)
    with pytest.raises(ResumeError, match=r"cannot resume from .*tuned.pt: it was made with another model"):
        tune(other, items[:2], targets[:2], recipe, work_dir=tmp_path, resume=True, progress=False)
    with pytest.raises(ValueError, match="`resume=True` needs `work_dir`"):
        tune(other, items, targets, recipe, resume=True, progress=False)


def test_a_finished_run_goes_on_with_tuning(tmp_path):
    """To the bits of a run that tuned from the start; with other settings once more when its state is removed."""
    model, items = small_model()
    once = {**TUNED, "name": "qdrop", "iterations": 3}

    def run(config, folder, resume=False):
        return quantize(model, items, config, work_dir=tmp_path / folder, resume=resume, progress=False)

    run({**once, "tune_steps": 0}, "kept")
    reconstructed = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept" / "units").iterdir()}
    assert reconstructed
    for config in (once, {**once, "tune_weight_lr": 0.1, "tune_steps": 4}):
        whole = run(config, f"whole{config['tune_steps']}")[0].state_dict()
        state = run(config, "kept", resume=True)[0].state_dict()
        assert state.keys() == whole.keys() and all(torch.equal(state[key], whole[key]) for key in state)
        assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept" / "units").iterdir()} == reconstructed
        with pytest.raises(ResumeError, match=r"tuned.pt: .* remove it to tune anew, or use a new work dir"):
            run({**config, "tune_lr": 0.5}, "kept", resume=True)
        (tmp_path / "kept" / "tuned.pt").unlink()


def test_a_model_without_masks_comes_closer_to_its_floating_point_outputs():
    model, items = small_model()
    wanted = [model(*item).detach() for item in items]
    tuned = dict(name="rtn", w_bits=3, a_bits=4, tune_steps=40, tune_lr=3e-3)
    errors = []
    for steps in (0, 40):
        quantized, _ = quantize(model, items, {**tuned, "tune_steps": steps}, progress=False)
        with torch.no_grad():
            errors.append(sum(float((quantized(*i) - w).square().sum()) for i, w in zip(items, wanted, strict=True)))
    assert errors[1] < 0.8 * errors[0]


def test_a_forward_without_gradients_is_named():
    model, items = small_model()

    @torch.no_grad()
    def forward(model, item):
        return model(*item)

    with pytest.raises(ValueError, match="tuning needs gradients, and none come through the model's forward"):
        quantize(model, items, dict(name="rtn", tune_steps=2), forward=forward, progress=False)


def test_targets_are_those_of_the_floating_point_model(tiny_sam, tiny_items):
    with torch.no_grad():
        expected = [box_forward(tiny_sam, item) for item in tiny_items]
    prepare(tiny_sam, Recipe.from_config("rtn"))
    calibrate(tiny_sam, tiny_items, box_forward, progress=False)
    set_quantization(tiny_sam, True)
    for found, wanted in zip(floating_outputs(tiny_sam, tiny_items, box_forward, False), expected, strict=True):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, wanted, strict=True))
    assert not any(q.quantizing for _, q in quantizers(tiny_sam) if not is_weight(q))
