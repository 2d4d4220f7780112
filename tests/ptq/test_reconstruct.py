# SPDX-License-Identifier: Apache-2.0
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ahcq_plugin import quantize
from ahcq_plugin.ptq import Recipe, calibrate, prepare, quantizers, reconstruct
from ahcq_plugin.ptq.loss import output_error, rounding_exponent
from ahcq_plugin.ptq.optimise import MAX_RELATIVE_STEP, ScaleLearner, mix, seeded
from ahcq_plugin.ptq.prepared import weight_layers
from ahcq_plugin.zoo.sam import box_forward

ROOT = Path(__file__).resolve().parents[2]
FAST = {"w_bits": 3, "a_bits": 4, "iterations": 60, "rounding_lr": 2e-2, "scale_lr": 1e-3}


def outputs(model, items):
    with torch.no_grad():
        return torch.cat([torch.cat([t.flatten() for t in box_forward(model, item)]) for item in items])


@pytest.mark.parametrize("name", ["adaround", "brecq", "qdrop"])
def test_learning_lowers_the_unit_errors_and_the_output_error(tiny_sam, tiny_items, name):
    reference = outputs(tiny_sam, tiny_items)
    nearest, _ = quantize(tiny_sam, tiny_items, "rtn", forward=box_forward, progress=False, w_bits=3, a_bits=4)
    learned, report = quantize(tiny_sam, tiny_items, {"name": name, **FAST}, forward=box_forward, progress=False)
    errors = [(outputs(m, tiny_items) - reference).square().mean().item() for m in (nearest, learned)]
    assert errors[1] < 0.8 * errors[0]
    ratio = [unit.error_after / unit.error_before for unit in report.units]
    assert sum(r < 1 for r in ratio) >= len(ratio) - 1, ratio
    assert report.audit.passed


def test_everything_is_hard_rounded_and_drop_is_off(tiny_sam, tiny_items):
    recipe = Recipe.from_config({"name": "qdrop", **FAST}, iterations=3)
    prepare(tiny_sam, recipe)
    calibrate(tiny_sam, tiny_items, box_forward, progress=False)
    flags = {n: p.requires_grad for n, p in tiny_sam.named_parameters()}
    reports = reconstruct(tiny_sam, tiny_items, recipe, box_forward, progress=False)
    assert [r.iterations for r in reports] == [3] * 6
    for layer in weight_layers(tiny_sam).values():
        quantizer = layer.weight_fake_quant
        assert not quantizer.adaround and quantizer.alpha is None
        assert torch.equal(quantizer.decode(quantizer.encode(layer.weight)), layer.weight)
    assert all(q.prob == 1.0 for _, q in quantizers(tiny_sam))
    assert {n: p.requires_grad for n, p in tiny_sam.named_parameters()} == flags


def test_floating_point_targets_come_from_untouched_weights(tiny_sam, tiny_items):
    """At 8 bit every unit's error stays tiny: targets do not drift from unit to unit."""
    _, report = quantize(
        tiny_sam, tiny_items, {"name": "qdrop", **FAST, "w_bits": 8, "a_bits": 8}, forward=box_forward, progress=False
    )
    assert max(unit.error_before for unit in report.units) < 1e-2


@pytest.mark.parametrize("name", ["adaround", "qdrop"])
def test_caches_on_disk_give_the_same_tensors_and_leave_nothing(tiny_sam, tiny_items, tmp_path, name):
    config = {"name": name, **FAST, "iterations": 3}
    stale = tmp_path / "unit_caches" / "cache-of-a-killed-run" / "0.pt"
    stale.parent.mkdir(parents=True)
    stale.touch()
    kept = tmp_path / "cache" / "detections.json"  # other people's: `--work-dir` may hold the cache of detections
    kept.parent.mkdir()
    kept.touch()
    states = [
        quantize(
            tiny_sam,
            tiny_items,
            {**config, "cache_device": device},
            forward=box_forward,
            work_dir=tmp_path,
            progress=False,
        )[0].state_dict()
        for device in ("cpu", "disk")
    ]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not list((tmp_path / "unit_caches").glob("*")) and kept.exists()


def test_same_seed_same_tensors_other_seed_other_tensors(tiny_sam, tiny_items):
    config = {"name": "qdrop", **FAST, "iterations": 10}
    runs = [
        quantize(tiny_sam, tiny_items, config, forward=box_forward, seed=seed, progress=False)[0].state_dict()
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    assert any(not torch.equal(runs[0][k], runs[2][k]) for k in runs[0])


def test_caller_random_state_is_untouched(tiny_sam, tiny_items):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    quantize(tiny_sam, tiny_items, {"name": "qdrop", **FAST, "iterations": 2}, forward=box_forward, progress=False)
    assert torch.equal(torch.rand(3), expected)


RUN = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
from conftest import make_tiny_items, make_tiny_sam
from ahcq_plugin import quantize
from ahcq_plugin.zoo.sam import box_forward
sam, items = make_tiny_sam(), make_tiny_items()
kill_at, resume = int(sys.argv[2]), sys.argv[3] == "resume"
steps, original = [0], torch.optim.Adam.step
def step(self, *args, **kwargs):
    steps[0] += 1
    if steps[0] == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)
torch.optim.Adam.step = step
config = dict(name="qdrop", w_bits=3, a_bits=4, iterations=12, rounding_lr=2e-2)
model, report = quantize(sam, items, config, forward=box_forward, work_dir=sys.argv[1], resume=resume, progress=False)
torch.save(model.state_dict(), sys.argv[1] + "/final.pt")
print("steps", steps[0])
"""


def run(work_dir, kill_at=0, resume=False):
    code = RUN.format(tests=str(ROOT / "tests"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(work_dir), str(kill_at), "resume" if resume else "fresh"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_resume_after_kill_equals_uninterrupted(tmp_path):
    """Killed with SIGKILL in the middle of the fourth unit: the same tensors, finished units not computed again."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    assert run(whole).returncode == 0
    killed = run(broken, kill_at=2 * (3 * 12 + 5))
    assert killed.returncode == -signal.SIGKILL
    assert len(list((broken / "units").glob("*.pt"))) == 3
    resumed = run(broken, resume=True)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.strip() == f"steps {2 * 3 * 12}"
    a, b = (torch.load(f / "final.pt", weights_only=True) for f in (whole, broken))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_resume_refuses_another_run(tiny_sam, tiny_items, tmp_path):
    config = {"name": "qdrop", **FAST, "iterations": 2}
    quantize(tiny_sam, tiny_items, config, forward=box_forward, work_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"cannot resume from .*: the recipe changed \(seed\); use a new work dir"):
        quantize(tiny_sam, tiny_items, config, forward=box_forward, work_dir=tmp_path, resume=True, seed=9)
    with pytest.raises(ValueError, match=r"cannot resume from .*: the model or the data changed"):
        quantize(tiny_sam, tiny_items[:2], config, forward=box_forward, work_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match="`resume=True` needs `work_dir`"):
        quantize(tiny_sam, tiny_items, config, forward=box_forward, resume=True)


class Stretchy(torch.nn.Module):
    """Stands for a quantizer; becomes a group of half as many scales at the milestones given."""

    def __init__(self, scale, milestones=()):
        super().__init__()
        self.scale, self.milestones = torch.nn.Parameter(torch.tensor(scale)), milestones

    def learnable_scales(self):
        return [self.scale]

    def keep_valid(self):
        pass

    def milestone(self, done):
        if done not in self.milestones:
            return False
        self.scale = torch.nn.Parameter(self.scale.detach()[: len(self.scale) // 2])
        return True


def learn(learner, quantizers, steps):
    for _ in range(steps):
        learner.zero_grad()
        sum(q.scale.sum() for q in quantizers).backward()
        learner.step()


def test_scales_move_by_the_learning_rate_but_by_little_of_themselves():
    quantizer = Stretchy([0.5, 0.002])
    learn(ScaleLearner([quantizer], 4e-4, 100), [quantizer], 1)
    assert quantizer.scale.tolist() == pytest.approx([0.5 - 4e-4, 0.002 * (1 - MAX_RELATIVE_STEP)], rel=1e-5)
    learn(ScaleLearner([quantizer], 10.0, 100), [quantizer], 200)
    assert (quantizer.scale > 0).all()


def test_a_milestone_leaves_the_other_scales_alone():
    """Moments and learning rate of the rest go on as if nothing had happened; the new scale is learned too."""
    alone, beside, grouped = Stretchy([0.5]), Stretchy([0.5]), Stretchy([0.5] * 8, (0.2, 0.6))
    learn(ScaleLearner([alone], 1e-3, 20), [alone], 20)
    learner = ScaleLearner([beside, grouped], 1e-3, 20)
    learn(learner, [beside, grouped], 4)
    assert grouped.scale.shape == (4,) and len(learner._optimizer.state) == 1
    before = grouped.scale.detach().clone()
    learn(learner, [beside, grouped], 16)
    assert grouped.scale.shape == (2,) and (grouped.scale < before[:2]).all()
    assert torch.equal(beside.scale, alone.scale)


def test_without_scales_there_is_nothing_to_do():
    learn(ScaleLearner([], 1e-3, 5), [Stretchy([1.0])], 5)


def test_mix_takes_elements_from_both():
    q, f = torch.ones(100, 100), torch.zeros(100, 100)
    with seeded(0, "unit", torch.device("cpu")):
        mixed = mix(((q, 3), {"k": q}), ((f, 3), {"k": f}), 0.25)
    assert mixed[0][1] == 3
    assert mixed[0][0].mean().item() == pytest.approx(0.25, abs=0.02)
    assert set(mixed[1]["k"].unique().tolist()) == {0.0, 1.0}
    assert mix(q, f, 1.0) is q


def test_seeding_leaves_other_generators_alone(monkeypatch):
    """No GPU is seeded for a module on the CPU, and what is drawn is what ``torch.manual_seed`` would draw."""
    seeded_gpus = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded_gpus.append)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    seeded_gpus.clear()
    with seeded(7, "unit", torch.device("cpu")):
        drawn = torch.rand(4)
    assert not seeded_gpus and torch.equal(torch.get_rng_state(), state)
    number = int.from_bytes(hashlib.sha256(b"7/unit").digest()[:7], "big")
    assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(number)))


def test_output_error_sums_channels_and_averages_the_rest():
    out, target = torch.full((2, 3, 4), 2.0), torch.zeros(2, 3, 4)
    assert output_error(out, target, [-1]).item() == 16.0
    assert output_error(out, target, [1]).item() == 12.0
    assert output_error((out, out), (target, target), [-1, -1]).item() == 32.0
    assert output_error((out, out), (target, target), [-1, 1]).item() == 28.0


def test_exponent_schedule():
    assert rounding_exponent(1, 10, 0.2, 20, 2) is None
    assert rounding_exponent(2, 10, 0.2, 20, 2) == 20
    assert rounding_exponent(9, 10, 0.2, 20, 2) == 2
