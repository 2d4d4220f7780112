# SPDX-License-Identifier: Apache-2.0
import sys

import pytest
import torch
from torch import nn

from ahcq_plugin import quantize
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq import Recipe, ResumeError, calibrate, freeze, prepare
from ahcq_plugin.ptq.features import FeatureForward
from ahcq_plugin.support.batches import default_forward
from ahcq_plugin.zoo.sam import box_forward
from tests.ptq.standins import DIM, Block

RTN = {"name": "rtn", "w_bits": 3, "a_bits": 4}
TUNED = {**RTN, "tune_feature_steps": 30, "tune_feature_units": ["blocks.0", "blocks.1"], "tune_weight_lr": 0.05}


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(DIM, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def small_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Blocks().eval(), [(torch.randn(2, 5, DIM),) for _ in range(4)]


def error(model, wanted, items):
    """Relative squared error of what the second block gives."""
    found = []
    handle = model.blocks[1].register_forward_hook(lambda module, args, out: found.append(out.detach()))
    for item in items:
        model(*item)
    handle.remove()
    return sum(float((one - two).square().sum() / two.square().sum()) for one, two in zip(found, wanted, strict=True))


def test_a_sam_runs_as_far_as_its_image_embedding(tiny_sam, tiny_items):
    recipe = Recipe.from_config(RTN)
    prepare(tiny_sam, recipe)
    calibrate(tiny_sam, tiny_items, box_forward, progress=False)
    freeze(tiny_sam)
    forward = FeatureForward(tiny_sam, ["image_encoder.*"], box_forward, tiny_items[0])
    called = []
    for name, unit in prepared_units(tiny_sam).items():
        unit.register_forward_hook(lambda module, args, out, name=name: called.append(name))
    with torch.no_grad():
        (features,) = forward(tiny_sam, tiny_items[1])
        wanted = tiny_sam.image_encoder(tiny_items[1]["image"])
    assert torch.equal(features, wanted)
    assert called and all(name.startswith("image_encoder.") for name in called)


def test_units_that_are_called_again_run_to_the_end():
    model, items = small_model()
    prepare(model, Recipe.from_config(RTN))

    def twice(model, batch):
        return default_forward(model, (model.blocks[0](*batch),))

    first, second = FeatureForward(model, ["blocks.0"], twice, items[0])(model, items[0])
    once = model.blocks[0](*items[0])
    assert torch.equal(first, once) and torch.equal(second, model.blocks[0](once))


def test_features_come_nearer_and_other_units_stay():
    model, items = small_model()
    wanted = []
    model.blocks[1].register_forward_hook(lambda module, args, out: wanted.append(out.detach()))
    for item in items:
        model(*item)
    model.blocks[1]._forward_hooks.clear()
    before, _ = quantize(model, items, RTN, progress=False)
    after, report = quantize(model, items, TUNED, progress=False)
    assert report.audit.passed and report.tuning is None
    assert report.feature_tuning.steps == 30 and "tune_features" in report.stages
    assert error(after, wanted, items) < 0.7 * error(before, wanted, items)
    assert report.feature_tuning.loss_after == pytest.approx(error(after, wanted, items) / len(items), rel=1e-5)
    others = {key: value for key, value in before.state_dict().items() if key.startswith(("blocks.2.", "head."))}
    state = after.state_dict()
    assert others and all(torch.equal(state[key], value) for key, value in others.items())


def test_both_tunings_go_on_from_what_is_kept(tmp_path, monkeypatch):
    """A run that was killed while it tuned the output has the tensors of an uninterrupted one."""
    monkeypatch.setattr(sys.modules["ahcq_plugin.ptq.tune"], "KEPT_EVERY", 3)
    model, items = small_model()
    config = {**TUNED, "tune_feature_steps": 4, "tune_steps": 8}
    whole = quantize(model, items, config, work_dir=tmp_path / "whole", progress=False)[0].state_dict()
    calls = []

    def dying(out, target):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return (out - target).square().mean()

    with pytest.raises(KeyboardInterrupt):
        quantize(model, items, config, work_dir=tmp_path / "broken", loss=dying, progress=False)
    kept = tmp_path / "broken" / "tuned_features.pt"
    written = kept.stat().st_mtime_ns
    (tmp_path / "broken" / "tuned.pt").unlink()  # of another loss
    state = quantize(model, items, config, work_dir=tmp_path / "broken", resume=True, progress=False)[0].state_dict()
    assert all(torch.equal(state[key], whole[key]) for key in whole) and kept.stat().st_mtime_ns >= written
    other = {**config, "tune_steps": 3}  # the features do not depend on it
    (tmp_path / "broken" / "tuned.pt").unlink()
    assert quantize(model, items, other, work_dir=tmp_path / "broken", resume=True, progress=False)[1].tuning.steps == 3
    with pytest.raises(ResumeError, match=r"tuned_features\.pt: it was made with another model"):
        quantize(
            *(model, items, {**config, "tune_feature_steps": 5}),
            work_dir=tmp_path / "broken",
            resume=True,
            progress=False,
        )


def test_what_cannot_be_is_said_before_all_work():
    model, items = small_model()
    with pytest.raises(ValueError, match="`tune_feature_steps` needs `tune_feature_units`"):
        Recipe.from_config("rtn", tune_feature_steps=3)
    with pytest.raises(ValueError, match="`tune_feature_units` has 'encoder', which matches none of the 3 units"):
        quantize(model, items, {**TUNED, "tune_feature_units": ["encoder"]}, progress=False)

    class Unread(Blocks):
        def forward(self, x):
            self.blocks[2](x)
            return self.blocks[1](self.blocks[0](x))

    with pytest.raises(ValueError, match=r"nothing reads what the units of `tune_feature_units`, \['blocks.2'\], give"):
        quantize(Unread().eval(), items, {**TUNED, "tune_feature_units": ["blocks.2"]}, progress=False)
