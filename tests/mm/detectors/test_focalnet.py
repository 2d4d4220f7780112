# SPDX-License-Identifier: Apache-2.0
"""The FocalNet backbone and the converter of official DINO checkpoints, by the official names and shapes."""

from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from torch.nn import functional as F

from ahcq_plugin.mm.detectors.convert_dino import convert_dino, convert_state_dict, new_name
from ahcq_plugin.mm.detectors.official import COCO_IDS, fit

CONFIG = Path(__file__).resolve().parents[3] / "mm_configs" / "_base_" / "detectors" / "dino_focalnet_l.py"
SMALL = dict(width=8, depths=(1, 2, 1, 1), levels=2, encoder=1)
FULL = dict(width=192, depths=(2, 2, 18, 2), levels=4, encoder=6)


def official_shapes(width, depths, levels, encoder, hidden=256, ffn=2048, queries=900):
    """Names and shapes of the official model with its 5-scale FocalNet config, from its modules' definitions."""
    shapes = {}

    def linear(name, out, into, *kernel):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into, *kernel), (out,)

    def norm(name, channels):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)

    backbone = "backbone.0"
    linear(f"{backbone}.patch_embed.proj", width, 3, 7, 7)
    norm(f"{backbone}.patch_embed.norm", width)
    for i, depth in enumerate(depths):
        d = width * 2**i
        for j in range(depth):
            block = f"{backbone}.layers.{i}.blocks.{j}"
            shapes[f"{block}.gamma_1"] = shapes[f"{block}.gamma_2"] = (d,)
            norm(f"{block}.norm1", d)
            norm(f"{block}.norm2", d)
            linear(f"{block}.modulation.f", 2 * d + levels + 1, d)
            linear(f"{block}.modulation.h", d, d, 1, 1)
            linear(f"{block}.modulation.proj", d, d)
            for k in range(levels):
                shapes[f"{block}.modulation.focal_layers.{k}.0.weight"] = (d, 1, 3 + 2 * k, 3 + 2 * k)
            linear(f"{block}.mlp.fc1", 4 * d, d)
            linear(f"{block}.mlp.fc2", d, 4 * d)
        if i < 3:
            linear(f"{backbone}.layers.{i}.downsample.proj", 2 * d, d, 3, 3)
            norm(f"{backbone}.layers.{i}.downsample.norm", 2 * d)
        norm(f"{backbone}.norm{i}", d)
        linear(f"input_proj.{i}.0", hidden, d, 1, 1)
    linear("input_proj.4.0", hidden, width * 8, 3, 3)
    for level in range(5):
        norm(f"input_proj.{level}.1", hidden)
    shapes |= {"transformer.level_embed": (5, hidden), "transformer.tgt_embed.weight": (queries, hidden)}
    shapes["label_enc.weight"] = (92, hidden)
    linear("transformer.enc_output", hidden, hidden)
    norm("transformer.enc_output_norm", hidden)
    for part, count, attention in (("encoder", encoder, "self_attn"), ("decoder", 6, "cross_attn")):
        for i in range(count):
            layer = f"transformer.{part}.layers.{i}"
            linear(f"{layer}.{attention}.sampling_offsets", 8 * 5 * 4 * 2, hidden)
            linear(f"{layer}.{attention}.attention_weights", 8 * 5 * 4, hidden)
            linear(f"{layer}.{attention}.value_proj", hidden, hidden)
            linear(f"{layer}.{attention}.output_proj", hidden, hidden)
            linear(f"{layer}.linear1", ffn, hidden)
            linear(f"{layer}.linear2", hidden, ffn)
            for number in (1, 2) if part == "encoder" else (1, 2, 3):
                norm(f"{layer}.norm{number}", hidden)
            if part == "decoder":
                shapes[f"{layer}.self_attn.in_proj_weight"] = (3 * hidden, hidden)
                shapes[f"{layer}.self_attn.in_proj_bias"] = (3 * hidden,)
                linear(f"{layer}.self_attn.out_proj", hidden, hidden)
    norm("transformer.decoder.norm", hidden)
    linear("transformer.decoder.ref_point_head.layers.0", hidden, 2 * hidden)
    linear("transformer.decoder.ref_point_head.layers.1", hidden, hidden)
    for i in range(6):
        for prefix in ("", "transformer.decoder."):
            linear(f"{prefix}class_embed.{i}", 91, hidden)
            for j, out in enumerate((hidden, hidden, 4)):
                linear(f"{prefix}bbox_embed.{i}.layers.{j}", out, hidden)
    linear("transformer.enc_out_class_embed", 91, hidden)
    for j, out in enumerate((hidden, hidden, 4)):
        linear(f"transformer.enc_out_bbox_embed.layers.{j}", out, hidden)
    return shapes


def random_state(shapes):
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    for name in shapes:  # the official model shares its heads with the decoder
        if name.startswith("transformer.decoder.") and (own := name.removeprefix("transformer.decoder.")) in state:
            state[name] = state[own]
    return state


def small_config():
    cfg = Config.fromfile(CONFIG)
    backbone = dict(embed_dim=8, depths=list(SMALL["depths"]), focal_levels=[2] * 4, focal_windows=[3] * 4)
    cfg.model.backbone.update(backbone)
    cfg.model.neck.in_channels = [8, 16, 32, 64]
    cfg.model.encoder.num_layers = 1
    return cfg


def official_backbone(x, state, depths, levels):
    """FocalNet by its definition: tokens last, Linear layers, norms after modulation and MLP, gammas."""

    def norm(t, name):
        return F.layer_norm(t, t.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(t, name):
        return F.linear(t, state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(t, name, **options):  # channels first
        return F.conv2d(t, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)

    def modulation(t, name):
        c = t.shape[-1]
        q, context, gates = linear(t, f"{name}.f").permute(0, 3, 1, 2).split((c, c, levels + 1), 1)
        total = 0
        for k in range(levels):
            context = F.gelu(conv(context, f"{name}.focal_layers.{k}.0", padding=1 + k, groups=c))
            total = total + context * gates[:, k : k + 1]
        total = total + F.gelu(context.mean((2, 3), keepdim=True)) * gates[:, levels:]
        return linear((q * conv(total, f"{name}.h")).permute(0, 2, 3, 1), f"{name}.proj")

    def padded(t, stride):
        return F.pad(t, (0, -t.shape[-1] % stride, 0, -t.shape[-2] % stride))

    found = []
    x = conv(padded(x, 4), "patch_embed.proj", stride=4, padding=3).permute(0, 2, 3, 1)
    x = norm(x, "patch_embed.norm")
    for i, depth in enumerate(depths):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            x = x + state[f"{block}.gamma_1"] * norm(modulation(x, f"{block}.modulation"), f"{block}.norm1")
            inner = linear(F.gelu(linear(x, f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
            x = x + state[f"{block}.gamma_2"] * norm(inner, f"{block}.norm2")
        found.append(norm(x, f"norm{i}").permute(0, 3, 1, 2))
        if i < 3:
            down = conv(padded(x.permute(0, 3, 1, 2), 2), f"layers.{i}.downsample.proj", stride=2, padding=1)
            x = norm(down.permute(0, 2, 3, 1), f"layers.{i}.downsample.norm")
    return found


@pytest.mark.parametrize("size", [(96, 64), (75, 50)])
def test_the_backbone_computes_what_the_official_one_does(size):
    state = random_state(official_shapes(**SMALL))
    backbone = MODELS.build(small_config().model.backbone).eval()
    converted = convert_state_dict({name: value for name, value in state.items() if name.startswith("backbone.0.")})
    backbone.load_state_dict({name.removeprefix("backbone."): value for name, value in converted.items()})
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    own = {name.removeprefix("backbone.0."): value for name, value in state.items()}
    with torch.no_grad():
        found, wanted = backbone(x), official_backbone(x, own, SMALL["depths"], SMALL["levels"])
    assert [tuple(t.shape[1:]) for t in found] == [tuple(t.shape[1:]) for t in wanted] and len(found) == 4
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_every_official_name_has_its_place_in_the_full_model():
    with torch.device("meta"):
        detector = MODELS.build(Config.fromfile(CONFIG).model)
        official = {name: torch.empty(shape) for name, shape in official_shapes(**FULL).items()}
        own = {
            name: value for name, value in official.items() if not name.startswith("transformer.decoder.class_embed")
        }
        own = {name: value for name, value in own.items() if not name.startswith("transformer.decoder.bbox_embed")}
        assert fit(convert_state_dict(own), detector).keys() == detector.state_dict().keys()


def test_a_file_is_converted_for_a_config(tmp_path):
    state = random_state(official_shapes(**SMALL))
    torch.save({"model": state}, tmp_path / "official.pth")
    small_config().dump(tmp_path / "small.py")
    count = convert_dino(tmp_path / "official.pth", tmp_path / "new.pth", tmp_path / "small.py")
    content = torch.load(tmp_path / "new.pth", weights_only=True)["state_dict"]
    assert count == len(content)
    detector = MODELS.build(small_config().model)
    detector.load_state_dict(content, strict=True)
    rows = list(COCO_IDS)
    assert torch.equal(content["bbox_head.cls_branches.2.weight"], state["class_embed.2.weight"][rows])
    assert torch.equal(content["bbox_head.cls_branches.6.bias"], state["transformer.enc_out_class_embed.bias"][rows])
    assert torch.equal(
        content["bbox_head.reg_branches.6.4.weight"], state["transformer.enc_out_bbox_embed.layers.2.weight"]
    )
    assert torch.equal(content["neck.extra_convs.0.conv.weight"], state["input_proj.4.0.weight"])


def test_other_checkpoints_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "mm.pth")
    with pytest.raises(ValueError, match=r"mm.pth has no state dict under 'model': not an official DINO \(FocalNet\)"):
        convert_dino(tmp_path / "mm.pth", tmp_path / "new.pth", tmp_path / "small.py")
    with pytest.raises(ValueError, match=r"unknown parameter 'fpn.x': not an official DINO \(FocalNet\) checkpoint"):
        new_name("fpn.x")
    with pytest.raises(ValueError, match="80 rows; expected 91"):
        convert_state_dict({"class_embed.0.weight": torch.zeros(80, 256)})
    state = {"class_embed.0.bias": torch.zeros(91), "transformer.decoder.class_embed.0.bias": torch.ones(91)}
    with pytest.raises(ValueError, match="differs from class_embed.0.bias"):
        convert_state_dict(state)
