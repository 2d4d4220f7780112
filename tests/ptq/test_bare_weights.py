# SPDX-License-Identifier: Apache-2.0
"""Models that call linear functions on bare weights, or nn.MultiheadAttention, quantized from end to end."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from ahcq_plugin import load_quantized, quantize, save_quantized
from ahcq_plugin.export import export_spec
from ahcq_plugin.export.compare import compare
from ahcq_plugin.ptq import Recipe, audit, prepare, set_quantization
from ahcq_plugin.ptq.coverage import IN_UNITS, INTEGERS, cover
from ahcq_plugin.ptq.distributions import collect_distributions
from ahcq_plugin.ptq.prepared import original_weights, weight_layers
from tests.conftest import computing_state

SIZE = dict(img_size=32, num_classes=4)
VIT = dict(**SIZE, patch_size=8, embed_dim=16, depth=2, num_heads=2)


class Detr(nn.Module):
    """DETR's decoder in small: self-attention with positions on queries and keys, cross-attention to memory."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(DetrLayer() for _ in range(2))
        self.embed, self.position = nn.Linear(192, 16), nn.Parameter(torch.zeros(1, 16, 16))

    def forward(self, image):
        memory = self.embed(image.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(-1, 16, 192))
        x = self.position.expand(len(memory), -1, -1)
        for layer in self.layers:
            x = layer(x, memory, self.position)
        return x.mean(1)


class DetrLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.cross = (nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2))
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, x, memory, position):
        q = x + position
        x = self.norm1(x + self.self_attn(q, q, x)[0])
        return self.norm2(x + self.cross(x + position, memory, memory, need_weights=False)[0])


def timm_model(module, name, **options):
    return getattr(pytest.importorskip(f"timm.models.{module}"), name)(**options)


MODELS = {
    "vit_b_16": lambda: VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4),
    "detr": Detr,
    "beit": lambda: timm_model("beit", "Beit", **VIT, qkv_bias=True, use_rel_pos_bias=True),
    "eva": lambda: timm_model("eva", "Eva", **VIT, use_rot_pos_emb=False),
    "swinv2": lambda: timm_model(
        "swin_transformer_v2", "SwinTransformerV2", **SIZE, patch_size=2, window_size=4, embed_dim=16,
        depths=(2, 2), num_heads=(2, 4),
    ),
}  # fmt: skip
PROJECTIONS = {
    "vit_b_16": "encoder.layers.encoder_layer_0.self_attention.in_proj",
    "detr": "layers.1.cross.in_proj_16_48",
    "beit": "blocks.0.attn.qkv",
    "eva": "blocks.0.attn.qkv",
    "swinv2": "layers.0.blocks.1.attn.qkv",
}
PACKED = ["vit_b_16", "detr"]


def build(name, seed=0):
    """A model in which every parameter matters."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.15)
    return model


def items():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 32, 32, generator=generator) for _ in range(3)]


@pytest.fixture(autouse=True)
def slow_path():
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_equal_with_quantizers_off_and_near_with_8_bit(name, tmp_path):
    model, batches = build(name), items()
    reference = model(batches[0])
    off = prepare(copy.deepcopy(model), Recipe.from_config("rtn"))
    set_quantization(off, False)
    torch.testing.assert_close(off(batches[0]), reference, rtol=0, atol=1e-6)
    assert sorted(key for key in off.state_dict() if "fake_quant" not in key) == sorted(model.state_dict())
    assert PROJECTIONS[name] in weight_layers(off)

    quantized, report = quantize(model, batches, "rtn", 8, 8, work_dir=tmp_path, progress=False)
    assert report.audit.passed
    assert float((quantized(batches[0]) - reference).norm() / reference.norm()) < 0.05
    coverage = report.coverage
    assert sum(part.weights for part in coverage.parts) == sum(p.numel() for p in model.parameters())
    assert not [part.name for part in coverage.parts if part.kind == IN_UNITS and part.name.startswith("left")]
    assert not [part.name for part in coverage.parts if part.kind == IN_UNITS and part.macs]

    loaded = load_quantized(tmp_path / "quantized.pth", lambda _: build(name, seed=1))
    assert torch.equal(loaded(batches[0]), quantized(batches[0]))
    save_quantized(quantized, tmp_path / "packed")
    packed = load_quantized(tmp_path / "packed", lambda _: build(name, seed=1)).state_dict()
    assert all(torch.equal(value, packed[key]) for key, value in computing_state(quantized).items())
    codes = {f"{name}.weight_fake_quant.codes" for name in weight_layers(quantized)}
    assert codes <= set(load_file(tmp_path / "packed")), "no weight of a layer is kept in floating point"
    assert audit(loaded, batches[0]).passed


@pytest.mark.parametrize(
    ("name", "recipe"), [("vit_b_16", "ahcq"), ("detr", "ahcq"), ("detr", "adaround"), ("beit", "qdrop")]
)
def test_reconstruction_goes_on_where_it_stopped(name, recipe, tmp_path):
    options = dict(w_bits=4, a_bits=4, iterations=3, progress=False)
    model, report = quantize(build(name), items(), recipe, work_dir=tmp_path / "whole", **options)
    assert report.audit.passed
    finished = sorted((tmp_path / "whole").rglob("0*.pt"))
    assert len(finished) == len(report.units) > 1
    finished[-1].unlink()
    resumed, _ = quantize(build(name), items(), recipe, work_dir=tmp_path / "whole", resume=True, **options)
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


@pytest.mark.parametrize("name", PACKED)
def test_weights_are_reported_by_the_names_of_their_parameters(name):
    model, batches = build(name), items()
    quantized, report = quantize(copy.deepcopy(model), batches, "rtn", 4, 4, progress=False)
    state = model.state_dict()
    assert all(torch.equal(weight, state[key]) for key, weight in report.unrounded.items())
    assert any(key.endswith(".in_proj_weight") for key in report.unrounded)
    shown = collect_distributions(quantized, batches[0], weights=report.unrounded)
    assert any("in_proj" in row.name for row in shown)
    assert cover(quantized).share(INTEGERS) > 0.4


class FirstRows(nn.Module):
    """Reads six of eight rows of a matrix."""

    def __init__(self):
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(8, 8)), nn.LayerNorm(8)

    def forward(self, x):
        return nn.functional.linear(self.norm(x), self.weight[:6])


def test_rows_that_no_layer_reads_are_shown():
    model = nn.Sequential(FirstRows()).eval()
    _, report = quantize(model, [torch.randn(2, 8)], "rtn", units=FirstRows, progress=False)
    weights = {part.name: part.weights for part in report.coverage.parts}
    assert weights == {"Linear and Conv2d": 48, "left: weight": 16, "norms, biases, scales": 16}


@pytest.mark.parametrize("name", PACKED)
def test_the_integer_model_equals_pytorch(name, tmp_path):
    quantized, _ = quantize(build(name), items(), "rtn", 4, 4, progress=False)
    spec = export_spec(quantized, tmp_path / "spec", items()[0])
    assert spec.left_out == ()
    rows, units = compare(quantized, spec, items()[:1])
    assert all(row.golden_error <= row.golden_limit and row.torch_error <= row.torch_limit for row in rows)
    assert sum(unit.codes for unit in units) and not sum(unit.differing for unit in units)


@torch.no_grad()
def test_rows_get_their_original_values_back():
    model = prepare(build("detr"), Recipe.from_config("rtn"))
    layer = weight_layers(model)["layers.1.cross.in_proj_16_48"]
    before, packed = layer.weight.clone(), model.get_parameter("layers.1.cross.in_proj_weight").clone()
    layer.original_weight = torch.ones_like(before)
    with original_weights(model):
        assert bool((model.get_parameter("layers.1.cross.in_proj_weight")[16:] == 1).all())
    assert torch.equal(model.get_parameter("layers.1.cross.in_proj_weight"), packed)


def test_the_audit_finds_a_parameter_that_was_replaced():
    quantized, _ = quantize(build("vit_b_16"), items(), "rtn", progress=False)
    assert audit(quantized, items()[0]).passed
    holder = quantized.encoder.layers.encoder_layer_0.self_attention
    holder.in_proj_weight = nn.Parameter(holder.in_proj_weight.detach().clone())
    problems = audit(quantized, items()[0]).problems
    assert any("in_proj: it reads a parameter that the model has" in problem for problem in problems), problems
