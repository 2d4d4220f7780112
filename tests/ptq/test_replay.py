# SPDX-License-Identifier: Apache-2.0
import copy
from collections import Counter

import pytest
import torch
from torch import nn

from ahcq_plugin import quantize
from ahcq_plugin.ptq import Recipe, audit, prepare, tune
from ahcq_plugin.ptq.prepared import weight_layers
from ahcq_plugin.ptq.replay import Replay, _bytes_for_backward
from ahcq_plugin.support.batches import model_device
from ahcq_plugin.zoo.sam import box_forward
from tests.ptq.standins import DIM, Block
from tests.ptq.test_tune import TUNED, frozen

DECODER = Recipe.from_config(TUNED, tune_units=["mask_decoder.*"])


def test_the_decoder_alone_learns_and_the_encoder_runs_once_an_item(tiny_sam, tiny_items, monkeypatch):
    model, targets = frozen(tiny_sam, tiny_items, DECODER)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    computed = Counter()
    answer = Replay._answer

    def counted(self, name, forward, args, kwargs):
        return answer(self, name, lambda *a, **k: (computed.update([name]), forward(*a, **k))[1], args, kwargs)

    monkeypatch.setattr(Replay, "_answer", counted)
    report = tune(model, tiny_items, targets, DECODER, box_forward, progress=False)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("mask_decoder.transformer.") for name in changed)
    assert report.loss_after < report.loss_before and audit(model, tiny_items[0], box_forward, DECODER).passed
    for name, count in computed.items():
        once, steps = len(tiny_items), DECODER.tune_steps * DECODER.batch_size
        # A tuned unit runs once more to see what it keeps, and not in backward: all of it fits.
        assert count == once if name.startswith("image_encoder.") else count == 2 * once + steps + 1


def test_what_is_looked_up_is_what_would_be_computed(tiny_sam, tiny_items, monkeypatch):
    """To the bit: with nothing kept, the same numbers are learned."""
    results = []
    for keeping in (True, False):
        model, targets = frozen(copy.deepcopy(tiny_sam), tiny_items, DECODER)
        if not keeping:
            found = Replay.__init__

            def init(self, *args, found=found):
                found(self, *args)
                self._kept = frozenset()

            monkeypatch.setattr(Replay, "__init__", init)
        tune(model, tiny_items, targets, DECODER, box_forward, progress=False)
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


class Twice(nn.Module):
    """Returns what the first block gives beside the last block's output, and writes to what it got."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x):
        early = self.first(x)
        late = self.second(early)
        early += 1.0
        return early, late


def test_outputs_that_the_model_returns_are_kept_too():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, items = Twice().eval(), [(torch.randn(2, 5, DIM),) for _ in range(2)]
    prepare(model, Recipe.from_config("rtn"))
    run = lambda item: model(*items[item])  # noqa: E731
    with torch.no_grad():
        wanted = [run(item) for item in range(2)]
    replay = Replay(model, {"second"}, run, model_device(model))
    with replay.running(), torch.no_grad():
        for _ in range(3):
            for item in range(2):
                for found, goal in zip(replay(item), wanted[item], strict=True):
                    assert torch.equal(found, goal)
    assert torch.equal(run(0)[1], wanted[0][1])


@pytest.mark.parametrize(("units", "first", "second"), [(0, 2, 2), (1.5, 1, 2), (3, 1, 1)])
def test_units_are_computed_anew_in_backward_where_an_item_would_keep_too_much(monkeypatch, units, first, second):
    """As many as do not fit, also of a larger item than the first; gradients are the same to the bit."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, items = Twice().eval(), [torch.randn(1, 5, DIM), torch.randn(2, 5, DIM)]
    prepare(model, Recipe.from_config("rtn"))
    run = lambda item: model.second(model.first(items[item])).square().sum()  # noqa: E731
    run(1).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    kept = _bytes_for_backward(lambda: model.first(items[1]))
    monkeypatch.setattr("ahcq_plugin.ptq.replay.KEPT_FOR_BACKWARD", units * kept)
    computed = Counter()
    for name in ("first", "second"):
        layer = model.get_submodule(name)
        layer.forward = lambda *args, name=name, of=layer.forward: (computed.update([name]), of(*args))[1]
    replay = Replay(model, {"first", "second"}, run, model_device(model))
    with replay.running():
        replay(0)
        computed.clear()
        model.zero_grad(set_to_none=True)
        replay(1).backward()
    assert computed == {"first": first, "second": second}
    assert wanted and all(torch.equal(model.get_parameter(name).grad, goal) for name, goal in wanted.items())


def test_globs_that_match_nothing_are_refused_before_anything_is_computed(tiny_sam, tiny_items):
    with pytest.raises(ValueError, match=r"`tune_units` has 'decoder\.\*', which matches none of the \d+ units"):
        prepare(tiny_sam, Recipe.from_config(TUNED, tune_units=["decoder.*"]))
    with pytest.raises(ValueError, match="`tune_units` must be a list of globs of units, got 'mask_decoder'"):
        Recipe.from_config(TUNED, tune_units="mask_decoder")


def test_more_items_tune_than_calibrate(tiny_sam, tiny_items):
    """The same as tuning on all of them by hand; an empty list is refused by its name."""
    with pytest.raises(ValueError, match="`tune_batches` is empty"):
        quantize(tiny_sam, tiny_items[:1], DECODER, forward=box_forward, progress=False, tune_batches=[])
    _, report = quantize(
        tiny_sam, tiny_items[:1], DECODER, forward=box_forward, progress=False, tune_batches=tiny_items
    )
    _, fewer = quantize(tiny_sam, tiny_items[:1], DECODER, forward=box_forward, progress=False)
    assert report.tuning.loss_before != fewer.tuning.loss_before and report.audit.passed


def test_weights_learn_on_the_grids_that_they_have(tiny_sam, tiny_items):
    """Codes change, scales and zero points of weights do not; the audit, which decodes codes, passes."""
    recipe = Recipe.from_config(DECODER, tune_weight_lr=0.2)
    model, targets = frozen(tiny_sam, tiny_items, recipe)
    layers = weight_layers(model)
    before = {name: layer.weight_fake_quant.encode(layer.weight) for name, layer in layers.items()}
    grids = {name: copy.deepcopy(layer.weight_fake_quant.state_dict()) for name, layer in layers.items()}
    report = tune(model, tiny_items, targets, recipe, box_forward, progress=False)
    assert report.loss_after < report.loss_before and audit(model, tiny_items[0], box_forward, recipe).passed
    moved = set()
    for name, layer in layers.items():
        quantizer, weight = layer.weight_fake_quant, layer.weight.detach()
        codes = quantizer.encode(weight)
        assert torch.equal(quantizer.decode(codes), weight)
        assert all(torch.equal(value, grids[name][key]) for key, value in quantizer.state_dict().items())
        moved |= {name} if bool((codes != before[name]).any()) else set()
    assert moved and all(name.startswith("mask_decoder.transformer.") for name in moved)
