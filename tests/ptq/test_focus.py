# SPDX-License-Identifier: Apache-2.0
"""Ranges of queries and keys by the focus of attention, against attentions computed by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from ahcq_plugin import quantize
from ahcq_plugin.ptq import Recipe, calibrate, prepare
from ahcq_plugin.ptq.focus import FocusRunner, clip_by_focus
from ahcq_plugin.ptq.prepared import activation_quantizers
from ahcq_plugin.quantizers import PercentileObserver
from ahcq_plugin.support.batches import default_forward
from tests.functional.test_focus import naive_distance

DIM, HEADS = 32, 2
RECIPE = {"name": "rtn", "w_bits": 4, "a_bits": 4}


class Cross(nn.Module):
    """Queries of some tokens, keys and values of others."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, q, k, v):
        q, k, v = (
            t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        )
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class OfItself(Cross):
    def forward(self, x):
        return super().forward(x, x, x)


class Model(nn.Module):
    def __init__(self, itself=False):
        super().__init__()
        self.cross, self.itself = OfItself() if itself else Cross(), itself

    def forward(self, tokens, image):
        return self.cross(tokens) if self.itself else self.cross(tokens, image, image * 2)


def model_and_items(outlier=0.0, itself=False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model(itself).eval()
        for layer in (model.cross.q_proj, model.cross.k_proj):
            layer.weight.data *= 4
        model.cross.k_proj.bias.data[3] += outlier  # the same for every key: no softmax sees it
        return model, [(torch.randn(2, 5, DIM), torch.randn(2, 40, DIM)) for _ in range(3)]


def quantizer_of(model, role, layer=""):
    found = [q for _, q in activation_quantizers(model) if q.role == role]
    layers = model.cross
    return next(q for q in found if not layer or getattr(layers, layer) in q.consumers)


def observed(outlier=0.0, itself=False, **keys):
    model, items = model_and_items(outlier, itself)
    prepare(model, Recipe.from_config(RECIPE, pcc=True, **keys))
    calibrate(model, items, progress=False)
    return model, items


def test_a_planted_outlier_is_clipped_and_costs_no_focus():
    """A constant of 60 on one channel of keys: the mean range follows it, the range by focus does not."""
    wide, _ = model_and_items(60.0)
    _, items = model_and_items()
    prepare(wide, Recipe.from_config(RECIPE))
    calibrate(wide, items, progress=False)
    plain = quantizer_of(wide, "k")
    clipped = quantizer_of(observed(60.0)[0], "k")
    assert float(plain.scale) * 15 > 55
    assert float(clipped.scale) < float(plain.scale) / 4
    reference, _ = model_and_items()
    with torch.no_grad():
        wanted = [reference(*item) for item in items]
    errors = []
    for pcc in (False, True):
        model, _ = model_and_items(60.0)
        quantized, report = quantize(model, items, {**RECIPE, "w_bits": 6, "pcc": pcc}, progress=False)
        assert report.audit.passed
        with torch.no_grad():
            errors.append(sum(float((quantized(*i) - w).square().sum()) for i, w in zip(items, wanted, strict=True)))
    assert errors[1] < errors[0] / 2


def by_hand(layers, item, ranges):
    """Probabilities in numpy (float64) with the tensors of ``ranges`` (lo, hi) quantized to 4 bits: None leaves one."""

    def rounded(x, limits):
        if limits is None:
            return x
        lo, hi = min(limits[0], 0.0), max(limits[1], 0.0)
        scale = np.float64(np.float32((np.float32(hi) - np.float32(lo)) / np.float32(15)))
        zero = np.clip(np.round(-np.float32(lo) / np.float32(scale)), 0, 15)
        return (np.clip(np.round(x / scale) + zero, 0, 15) - zero) * scale

    def linear(x, layer):
        weight, bias = (t.detach().double().numpy() for t in (layer.weight, layer.bias))
        return x @ weight.T + bias

    tokens, image = (t.double().numpy() for t in item)
    q = rounded(linear(rounded(tokens, ranges[0]), layers.q_proj), ranges[2])
    k = rounded(linear(rounded(image, ranges[1]), layers.k_proj), ranges[3])
    q, k = (t.reshape(*t.shape[:2], HEADS, -1).transpose(0, 2, 1, 3) for t in (q, k))
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_the_choice_is_that_of_a_search_by_hand():
    """Coordinate descent in numpy, two rounds over inputs of queries and keys, then queries and keys."""
    model, items = observed(10.0)
    places = [quantizer_of(model, "qkv_in", "q_proj"), quantizer_of(model, "qkv_in", "k_proj")]
    places += [quantizer_of(model, "q"), quantizer_of(model, "k")]
    candidates = [[(float(lo), float(hi)) for lo, hi in q.activation_post_process.ranges()] for q in places]
    references = [by_hand(model.cross, item, [None] * 4) for item in items]
    chosen = [None] * 4
    for place in (0, 1, 2, 3) * 2:
        errors = []
        for candidate in candidates[place]:
            tried = [candidate if index == place else limits for index, limits in enumerate(chosen)]
            found = [by_hand(model.cross, item, tried) for item in items]
            errors.append(sum(naive_distance(a, b, 0.5) for a, b in zip(references, found, strict=True)))
        chosen[place] = candidates[place][int(np.argmin(errors))]
    for quantizer, (lo, hi) in zip(places, chosen, strict=True):
        assert float(quantizer.scale) == pytest.approx((max(hi, 0) - min(lo, 0)) / 15, rel=1e-5)
    assert chosen != [limits[0] for limits in candidates]  # or nothing was searched


def test_an_input_that_values_read_too_keeps_its_range():
    """One tensor for queries, keys and values has one quantizer: attention alone must not decide about it."""
    model, items = observed(itself=True)
    shared, plain = quantizer_of(model, "qkv_in"), model_and_items(itself=True)[0]
    assert {model.cross.q_proj, model.cross.v_proj} <= set(shared.consumers)
    prepare(plain, Recipe.from_config(RECIPE))
    calibrate(plain, items, progress=False)
    assert torch.equal(shared.scale, quantizer_of(plain, "qkv_in").scale)
    names = clip_by_focus(model, items, default_forward, progress=False)
    assert {dict(activation_quantizers(model))[name].role for name in names} == {"q", "k"}
    apart, _ = observed(itself=True, share_inputs=False)
    assert len(clip_by_focus(apart, items, default_forward, progress=False)) == 4


def test_items_are_asked_for_one_by_one():
    """Items of a run are made when they are asked for by number, and give no slices."""

    class Items(list):
        def __getitem__(self, place):
            assert isinstance(place, int)
            return super().__getitem__(place)

    model, items = model_and_items(outlier=50.0)
    found = []
    for given in (items, Items(items)):
        prepared = prepare(copy.deepcopy(model), Recipe.from_config({**RECIPE, "pcc": True}))
        calibrate(prepared, given, lambda model, item: model(*item), progress=False)
        found.append(prepared.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_nothing_is_clipped_where_clipping_cannot_help():
    """Of equally good ranges the widest: the mean minimum and maximum."""
    model, items = observed()
    runner = FocusRunner(model.cross, {})
    (quantizer,) = [q for q, turn in runner.turns.items() if turn == 2]
    widest = quantizer.activation_post_process.ranges()[0]
    quantizer.activation_post_process.ends = torch.stack([lo.expand(29, 1) for lo in widest])
    clip_by_focus(model, items, default_forward, progress=False)
    assert float(quantizer.scale) == pytest.approx(float(widest[1] - widest[0]) / 15, rel=1e-6)


def test_only_decoders_and_uniform_quantizers_are_asked(tiny_sam):
    prepare(tiny_sam, Recipe.from_config("ahcq", pcc=True))
    units = {"image_encoder.blocks.0": set(), "mask_decoder.transformer.layers.1": {2, 3}}
    for name, turns in units.items():
        assert set(FocusRunner(tiny_sam.get_submodule(name), {}).turns.values()) == turns, name
    searched = {
        q.role for _, q in activation_quantizers(tiny_sam) if isinstance(q.activation_post_process, PercentileObserver)
    }
    assert searched == {"q", "k"}  # inputs have groups
