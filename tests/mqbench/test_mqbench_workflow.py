# SPDX-License-Identifier: Apache-2.0
"""MQBench's reconstruction with our quantizers, and our engine where MQBench's fails."""

import pytest
import torch

pytest.importorskip("mqbench.advanced_ptq", reason="needs MQBench, see docs/mqbench.md", exc_type=ImportError)

from mqbench import advanced_ptq
from mqbench.advanced_ptq import ptq_reconstruction
from mqbench.prepare_by_platform import BackendType, prepare_by_platform
from mqbench.utils.state import enable_calibration, enable_quantization

from ahcq_plugin import ptq
from ahcq_plugin.graph import BlockTracer
from ahcq_plugin.mqbench import AHCQ_BACKEND, calibrate, reconstruct
from ahcq_plugin.mqbench.quantizers import AdaRoundFakeQuantize, CAGFakeQuantize, UniformFakeQuantize
from ahcq_plugin.ptq import Recipe
from tests.mqbench.models import (
    MLP,
    Attention,
    FusedAttention,
    ViT,
    build,
    by_name,
    clone,
    patches,
    ptq_config,
    relative_error,
)

MODELS = {"MLP": (MLP,), "ViT": (ViT, Attention, 1)}


def by_platform(model, **extra):
    config = {"extra_quantizer_dict": {"prequant": []} | extra}
    return prepare_by_platform(clone(model), AHCQ_BACKEND, config, custom_tracer=BlockTracer()).eval()


def calibrated(kind, family, w_bits=8, a_bits=4):
    """A model with one family by name, or with our backend (family None), calibrated and switched on."""
    model, data = build(*MODELS[kind]), patches(6)
    if family is None:
        prepared = by_platform(model, recipe=dict(name="ahcq", w_bits=w_bits, a_bits=a_bits))
        calibrate(prepared, data, progress=False)
    else:
        config = {"extra_qconfig_dict": by_name(family, a_bits, w_bits)}
        prepared = prepare_by_platform(clone(model), BackendType.Academic, config)
        enable_calibration(prepared.eval())
        with torch.no_grad():
            for x in data:
                prepared(x)
    enable_quantization(prepared)
    return prepared, model, data


@pytest.mark.parametrize("family", ["HLUQ", "CAG", None])
@pytest.mark.parametrize("kind", MODELS)
def test_mqbenchs_reconstruction_lowers_the_error(kind, family):
    prepared, model, data = calibrated(kind, family, w_bits=4, a_bits=6)
    before = relative_error(prepared, model, data)
    scales = {name: q.scale.clone() for name, q in ptq.quantizers(prepared) if "post_act" in name}
    done = ptq_reconstruction(prepared, data, ptq_config(max_count=1000))
    enable_quantization(done)  # MQBench switches on only what its subgraphs held
    assert relative_error(done, model, data) < 0.98 * before, "1,000 of the usual 20,000 iterations"
    moved = {q.family for n, q in ptq.quantizers(done) if n in scales and not torch.equal(q.scale, scales[n])}
    assert moved >= ({"hluq"} if family is None else {family.lower()}), "scales are learned"
    assert "lnq" not in moved, "LNQ has nothing to learn"
    for name, quantizer in ptq.quantizers(done):
        assert quantizer.prob == 1.0 and quantizer.problems() == [], name
        if isinstance(quantizer, AdaRoundFakeQuantize):
            weight = done.get_submodule(name.removesuffix(".weight_fake_quant")).weight
            assert not quantizer.adaround and torch.equal(quantizer(weight), weight), f"{name}: hard-rounded"


@pytest.mark.slow
def test_mqbench_learns_the_rounding_of_our_weights():
    prepared, model, data = calibrated("MLP", "HLUQ", w_bits=4)
    before = relative_error(prepared, model, data)
    done = ptq_reconstruction(prepared, data, ptq_config(max_count=3000))
    enable_quantization(done)
    assert relative_error(done, model, data) < 0.5 * before


def test_after_mqbenchs_reconstruction_the_audit_passes():
    prepared, _, data = calibrated("ViT", None)
    done = ptq_reconstruction(prepared, data, ptq_config(max_count=5))
    enable_quantization(done)
    assert ptq.audit(done, data[0]).problems == []


def test_drop_probability_is_obeyed_while_mqbench_learns(monkeypatch):
    prepared, _, data = calibrated("MLP", "HLUQ")
    kept = []
    original = advanced_ptq.LossFunction.__call__

    def looking(self, pred, tgt):
        for name, module in self.subgraph.named_modules():
            if "post_act" in name and hasattr(module, "prob"):
                x = torch.linspace(-0.37, 0.61, 20000)
                kept.append((module.prob, float((module(x).detach() != module.quantize(x).detach()).float().mean())))
        return original(self, pred, tgt)

    monkeypatch.setattr(advanced_ptq.LossFunction, "__call__", looking)
    ptq_reconstruction(prepared, data, ptq_config(max_count=2, prob=0.3))
    assert kept and all(prob == pytest.approx(0.3) and abs(share - 0.7) < 0.03 for prob, share in kept)


def test_without_a_learning_rate_scales_stay():
    prepared, _, data = calibrated("MLP", "HLUQ")
    config = ptq_config(max_count=5)
    del config.scale_lr
    scales = [q.scale.clone() for _, q in ptq.quantizers(prepared)]
    done = ptq_reconstruction(prepared, data, config)
    assert all(torch.equal(q.scale, s) for (_, q), s in zip(ptq.quantizers(done), scales, strict=True))


def test_a_scale_carried_below_zero_is_brought_back():
    quantizer = UniformFakeQuantize(quant_max=15)
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    quantizer.enable_observer()
    quantizer(x)
    quantizer.disable_observer()
    quantizer.enable_fake_quant()
    with torch.no_grad():
        quantizer.scale.fill_(-0.1)
    quantizer(x).sum().backward()
    assert float(quantizer.scale) == pytest.approx(0.1) and quantizer.scale.grad is not None


def test_soft_weights_follow_a_folded_weight():
    """MQBench calls init with the layer's weight and quantizes the one folded with BatchNorm."""
    quantizer = AdaRoundFakeQuantize(quant_max=15, ch_axis=0)
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    quantizer.enable_observer()
    quantizer(weight)
    quantizer.disable_observer()
    quantizer.enable_fake_quant()
    quantizer.init(weight, "learned_hard_sigmoid")
    folded = weight * 0.5
    error = (quantizer(folded) - folded).abs() / quantizer.scale[:, None]
    assert float(error.max()) < 1.0 + 1e-5
    with pytest.raises(ValueError, match="`round_mode` must be 'learned_hard_sigmoid'"):
        quantizer.init(weight, "nearest")


def test_mqbench_cannot_cut_fused_attention_with_its_own_quantizers_either():
    own = by_name("Uniform") | dict(
        w_observer="MinMaxObserver",
        a_observer="EMAMinMaxObserver",
        w_fakequantize="AdaRoundFakeQuantize",
        a_fakequantize="QDropFakeQuantize",
    )
    prepared = prepare_by_platform(build(ViT, FusedAttention), BackendType.Academic, {"extra_qconfig_dict": own})
    data = patches(2)
    enable_calibration(prepared.eval())
    with torch.no_grad():
        prepared(data[0])
    with pytest.raises(KeyError):
        ptq_reconstruction(prepared, data, ptq_config(max_count=1))


def test_our_engine_reconstructs_what_mqbench_cannot(tmp_path):
    vit, data = build(ViT, FusedAttention, 1), patches(6)
    recipe = dict(name="ahcq", acnr=False, iterations=150, rounding_lr=3e-2, scale_lr=4e-3)
    rounded = by_platform(vit, recipe=recipe)
    calibrate(rounded, data, progress=False)
    enable_quantization(rounded)
    learned = by_platform(vit, recipe=recipe)
    (report,) = reconstruct(learned, data, work_dir=tmp_path, progress=False)
    assert relative_error(learned, vit, data) < 0.95 * relative_error(rounded, vit, data)
    assert report.iterations == 150
    assert ptq.audit(learned, data[0]).problems == []
    groups = {len(q.scale) for _, q in ptq.quantizers(learned) if isinstance(q, CAGFakeQuantize)}
    assert groups == {4}, "clustered at the milestones"
    again = by_platform(vit, recipe=recipe)
    reconstruct(again, data, work_dir=tmp_path, resume=True, progress=False)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in learned.state_dict().items())


def test_our_engine_gives_the_numbers_of_the_native_toolkit(tiny_sam, tiny_items):
    from ahcq_plugin import quantize
    from ahcq_plugin.mqbench import prepare, prepare_unit
    from ahcq_plugin.zoo.sam import box_forward

    recipe = Recipe.from_config("ahcq", iterations=5)
    options = dict(recipe=recipe, forward=box_forward, progress=False)
    native, report = quantize(tiny_sam, tiny_items, **options)
    hosted, other = quantize(tiny_sam, tiny_items, **options, prepare_unit=prepare_unit)
    assert other.roles == report.roles and other.audit == report.audit
    assert native.state_dict().keys() == hosted.state_dict().keys()
    assert [k for k, v in native.state_dict().items() if not torch.equal(v, hosted.state_dict()[k])] == []
    by_hand = prepare(clone(tiny_sam), recipe)
    ptq.precondition(by_hand, tiny_items, recipe, box_forward, progress=False)
    reconstruct(by_hand, tiny_items, box_forward, progress=False)
    assert [k for k, v in native.state_dict().items() if not torch.equal(v, by_hand.state_dict()[k])] == []


@pytest.mark.parametrize("call", [calibrate, reconstruct])
def test_a_model_of_another_backend_is_refused(call):
    prepared = prepare_by_platform(build(MLP), BackendType.Academic, {"extra_qconfig_dict": by_name("HLUQ")})
    with pytest.raises(ValueError, match="was not prepared for backend 'AHCQ'"):
        call(prepared, patches())
