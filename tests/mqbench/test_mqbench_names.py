# SPDX-License-Identifier: Apache-2.0
"""Our quantizers by name in MQBench's Academic setting, on a small ViT."""

import pytest
import torch

pytest.importorskip("mqbench.prepare_by_platform", reason="needs MQBench, see docs/mqbench.md", exc_type=ImportError)

from mqbench.prepare_by_platform import BackendType, prepare_by_platform
from mqbench.utils.state import disable_all, enable_all, enable_calibration, enable_quantization

import ahcq_plugin.mqbench  # noqa: F401  registers
from ahcq_plugin.mqbench.quantizers import FAKE_QUANTIZERS
from ahcq_plugin.ptq import quantizers
from tests.mqbench.models import ViT, build, by_name, clone, patches, relative_error

NAMES = [name.removesuffix("FakeQuantize") for name in FAKE_QUANTIZERS if name != "AHCQWeightFakeQuantize"]

FOR_PROBABILITIES = ("LNQ", "AGQ")  # they have no negative levels, and Academic gives every tensor the same quantizer


def prepare(family, bits=4, **changes):
    reference = build(ViT)
    extra = {"extra_qconfig_dict": by_name(family, bits) | changes}
    if family == "PowerOfTwo":  # at most 6 bits, and Academic gives the last layer 8
        extra["extra_quantizer_dict"] = {"exclude_module_name": ["head", "patch"]}
    return prepare_by_platform(clone(reference), BackendType.Academic, extra).eval(), reference


@torch.no_grad()
def calibrate(model, data):
    enable_calibration(model)
    for x in data:
        model(x)


@pytest.mark.parametrize("family", NAMES)
def test_the_workflow_of_mqbench(family):
    model, reference = prepare(family)
    data = patches()
    kinds = {type(module) for name, module in quantizers(model) if "post_act" in name}
    assert kinds == {FAKE_QUANTIZERS[f"{family}FakeQuantize"]}
    calibrate(model, data)
    assert relative_error(model, reference, data) == 0, "calibration computes in floating point"
    enable_quantization(model)
    error = relative_error(model, reference, data)
    assert 0 < error < (2 if family in FOR_PROBABILITIES else 0.5)
    with torch.no_grad():
        for name, quantizer in quantizers(model):
            seen = []
            hook = quantizer.register_forward_hook(lambda q, x, out, s=seen: s.append((x[0], out)))
            model(data[0])
            hook.remove()
            x, out = seen[0]
            assert torch.equal(out, quantizer.decode(quantizer.encode(x))), name
            levels = quantizer.quant_max + 1
            assert "weight" in name or family == "CAG" or len(out.unique()) <= levels
    disable_all(model)
    assert relative_error(model, reference, data) == 0


@pytest.mark.parametrize("family", ["Uniform", "CAG", "HLUQ"])
def test_more_bits_less_error(family):
    errors = []
    for bits in (3, 5, 8):
        model, reference = prepare(family, bits)
        calibrate(model, patches())
        enable_quantization(model)
        errors.append(relative_error(model, reference, patches()))
    assert errors == sorted(errors, reverse=True) and errors[2] < errors[0]


def test_the_first_and_the_last_layer_have_eight_bits():
    model, _ = prepare("HLUQ", 4)
    bits = {name: quantizer.bits for name, quantizer in quantizers(model)}
    assert bits["patch.weight_fake_quant"] == bits["head.weight_fake_quant"] == 8
    assert bits["blocks.0.fc2.weight_fake_quant"] == 4 == bits["blocks_0_act_post_act_fake_quantizer"]


def test_switching_on_ends_the_calibration_and_groups_the_channels():
    model, _ = prepare("CAG")
    quantizer = model.get_submodule("blocks_0_norm2_post_act_fake_quantizer")
    calibrate(model, patches())
    assert quantizer.pending and len(quantizer.scale) == 1
    enable_quantization(model)
    assert not quantizer.pending and len(quantizer.scale) == 4 and quantizer.problems() == []
    weight = model.get_submodule("blocks.0.fc1.weight_fake_quant")
    assert len(weight.scale) == 64 and weight.seen is None


def test_a_second_calibration_goes_on_like_mqbenchs_own():
    once, _ = prepare("HLUQ")
    twice, _ = prepare("HLUQ")
    data = patches()
    calibrate(once, data)
    enable_quantization(once)
    calibrate(twice, data[:2])
    enable_quantization(twice)
    calibrate(twice, data[2:])
    enable_quantization(twice)
    for (name, a), (_, b) in zip(quantizers(once), quantizers(twice), strict=True):
        assert torch.equal(a.scale, b.scale), name


def test_weights_are_searched_once_however_many_batches_there_are(monkeypatch):
    from ahcq_plugin.quantizers import observers

    calls = []
    search = observers.search_range
    monkeypatch.setattr(observers, "search_range", lambda rows, bits: calls.append(1) or search(rows, bits))
    model, _ = prepare("Uniform")
    calibrate(model, patches(5))
    enable_quantization(model)
    assert len(calls) == sum("weight" in name for name, _ in quantizers(model))


def test_enable_all_follows_every_batch():
    model, _ = prepare("Uniform")
    quantizer = model.get_submodule("blocks_0_act_post_act_fake_quantizer")
    enable_all(model)
    with torch.no_grad():
        model(patches()[0])
        first = quantizer.scale.clone()
        model(patches()[0] * 3)
    assert quantizer.observing and quantizer.quantizing and not torch.equal(quantizer.scale, first)


@pytest.mark.parametrize("family", NAMES)
def test_state_dicts_go_round(family):
    model, _ = prepare(family)
    calibrate(model, patches())
    enable_quantization(model)
    other, _ = prepare(family)
    calibrate(other, [x * 5 for x in patches()])  # pending: must not overwrite what is loaded
    other.load_state_dict(model.state_dict())
    enable_quantization(other)
    with torch.no_grad():
        assert torch.equal(other(patches()[0]), model(patches()[0]))


def test_our_observers_serve_mqbenchs_fake_quantizers():
    names = dict(a_observer="UniformObserver", a_fakequantize="FixedFakeQuantize", w_fakequantize="FixedFakeQuantize")
    model, reference = prepare("Uniform", 8, **names)
    calibrate(model, patches())
    enable_quantization(model)
    assert 0 < relative_error(model, reference, patches()) < 0.05


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(a_qscheme=dict(bit=4, symmetry=True, per_channel=False)), ValueError, "set 'symmetry': False"),
        (
            dict(a_qscheme=dict(bit=4, symmetry=False, per_channel=False, pot_scale=True)),
            ValueError,
            "'pot_scale': False",
        ),
        (dict(a_observer="EMAMinMaxObserver"), TypeError, "needs an OutputErrorObserver, got EMAMinMaxObserver"),
        (dict(a_observer="UniformObserver"), TypeError, "needs an OutputErrorObserver, got UniformObserver"),
        (dict(a_qscheme=dict(bit=4, symmetry=False, per_channel=True)), ValueError, "`ch_axis` must be -1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        prepare("HLUQ", **changes)


def test_an_observer_of_mqbench_is_refused():
    with pytest.raises(TypeError, match="needs an observer of ahcq_plugin, got EMAMinMaxObserver; allowed: .*HLUQObs"):
        prepare("Uniform", a_observer="EMAMinMaxObserver")


def test_cag_wants_its_own_channels_and_observer():
    with pytest.raises(ValueError, match="'per_channel': False"):
        prepare("CAG", a_qscheme=dict(bit=4, symmetry=False, per_channel=True))
    with pytest.raises(TypeError, match="needs a ChannelObserver, got UniformObserver"):
        prepare("CAG", a_observer="UniformObserver")
