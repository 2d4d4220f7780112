# SPDX-License-Identifier: Apache-2.0
"""``data/hdetr_official_*``: from the official code (github.com/HDETR/H-Deformable-DETR, commit f58ceb1).

``shapes``: names and shapes of the models of its 36-epoch scripts ``..._dp0_mqs_lft_...`` (Swin-L: ``n900``).
``outputs``: what its R50 and Swin-T models with one encoder and two decoder layers compute, in inference, from the
weights of :func:`seeded` and the images of :func:`images`; some queries and labels (of 80) of the last layer, and sums
over all of them.
"""

import argparse
import gzip
import json
import re
import zlib
from pathlib import Path

import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from ahcq_plugin.mm.detectors.convert_hdetr import OFFICIAL, convert_hdetr, convert_state_dict, new_name
from ahcq_plugin.mm.detectors.official import COCO_IDS, build_detector, fit, read_checkpoint

DATA = Path(__file__).parent / "data"
DETECTORS = Path(__file__).resolve().parents[3] / "mm_configs" / "_base_" / "detectors"
CONFIGS = {"r50": "hdetr_r50.py", "swin_tiny": "hdetr_swin_t.py", "swin_large": "hdetr_swin_l.py"}


@pytest.fixture(scope="module")
def official_shapes():
    return json.loads(gzip.decompress((DATA / "hdetr_official_shapes.json.gz").read_bytes()))


def seeded(name, shape):
    """A tensor that depends on its name alone; one for all names of a shared parameter."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("running_var"):
        return 1 + 0.1 * noise.abs()
    if len(shape) > 1:
        return noise / noise[0].numel() ** 0.5
    norm = "norm" in name or "bn" in name or name.split(".")[-2] == "1"
    return 1 + 0.1 * noise if norm and name.endswith("weight") else 0.1 * noise


def images():
    """Two images of 128 pixels, the second 96 wide and padded."""
    pixels = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    pixels[1, :, :, 96:] = 0
    metas = [dict(img_shape=(128, width), batch_input_shape=(128, 128)) for width in (128, 96)]
    return pixels, [DetDataSample(metainfo=meta) for meta in metas]


def small(variant):
    """Config of the variant with one encoder and two decoder layers."""
    model = Config.fromfile(DETECTORS / CONFIGS[variant]).model
    model.encoder.num_layers, model.decoder.num_layers = 1, 2
    return model


def official_state(shapes, model):
    """State dict of the small official model, with seeded values."""
    beyond = re.compile(r"encoder\.layers\.[1-9]|decoder\.layers\.[2-9]|(class|bbox)_embed\.[3-9]")
    index = {k: v for k, v in model.state_dict().items() if k.endswith("relative_position_index")}
    state = {}
    for name, shape in shapes.items():
        if beyond.search(name):
            continue
        if name.endswith("relative_position_index"):
            ours = name.replace("backbone.0.body.layers", "backbone.stages").replace("attn.", "attn.w_msa.")
            state[name] = index[ours]
        else:
            state[name] = seeded(
                name.replace("transformer.decoder.class", "class").replace("transformer.decoder.bbox", "bbox"), shape
            )
    return state


@pytest.mark.parametrize("variant", CONFIGS)
def test_every_official_parameter_has_its_place(official_shapes, variant):
    shared = {}  # one tensor for the names of a shared parameter, as in a checkpoint
    official = {
        name: shared.setdefault(
            name.removeprefix("transformer.decoder.") if "_embed." in name else name, torch.empty(shape, device="meta")
        )
        for name, shape in official_shapes[variant].items()
    }
    model = build_detector(DETECTORS / CONFIGS[variant], "HDeformableDETR")
    state = fit(convert_state_dict(official), model)
    assert list(state) == list(model.state_dict())
    copies = sum(name.startswith(("transformer.decoder.class", "transformer.decoder.bbox")) for name in official)
    counters = sum(name.endswith("num_batches_tracked") for name in state)
    assert len(state) == len(official) - copies + counters


@pytest.mark.parametrize("variant", ["r50", "swin_tiny"])
def test_a_converted_model_computes_what_the_official_one_does(official_shapes, variant):
    model = MODELS.build(small(variant)).eval()
    state = fit(convert_state_dict(official_state(official_shapes[variant], model)), model)
    model.load_state_dict(state, strict=True)
    pixels, samples = images()
    with torch.no_grad():
        features = model.forward_transformer(model.extract_feat(pixels), samples)
        scores, boxes = (layers[-1] for layers in model.bbox_head(**features))
    expected = json.loads((DATA / "hdetr_official_outputs.json").read_text())[variant]
    queries, labels = expected["queries"], expected["labels"]
    torch.testing.assert_close(boxes[:, queries], torch.tensor(expected["boxes"]), rtol=0, atol=1e-4)
    torch.testing.assert_close(scores[:, queries][..., labels], torch.tensor(expected["logits"]), rtol=0, atol=1e-3)
    sums = [scores.double().sum().item(), boxes.double().sum().item()]
    assert scores.shape == (2, 300, 80) and sums == pytest.approx(expected["sums"], rel=1e-4)


def test_coco_ids_are_torchvisions():
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert tuple(names[i] for i in COCO_IDS) == tuple(name for name in names[1:] if name != "N/A")
    assert len(COCO_IDS) == len(CocoDataset.METAINFO["classes"]) == 80


def test_the_encoders_first_row_stays_first():
    rows = torch.arange(91.0)
    state = convert_state_dict({f"class_embed.{i}.bias": rows + 100 * i for i in range(3)})
    for i, expected in enumerate([COCO_IDS, COCO_IDS, (0, *COCO_IDS[1:])]):
        assert state[f"bbox_head.cls_branches.{i}.bias"].tolist() == [100 * i + row for row in expected]


@pytest.mark.parametrize(
    ("official", "ours"),
    [
        # in the official decoder layer self-attention comes first, its norm is the second
        ("transformer.decoder.layers.3.norm1.bias", "decoder.layers.3.norms.1.bias"),
        ("transformer.decoder.layers.3.norm2.bias", "decoder.layers.3.norms.0.bias"),
        ("transformer.decoder.layers.3.norm3.bias", "decoder.layers.3.norms.2.bias"),
        ("transformer.encoder.layers.5.norm2.weight", "encoder.layers.5.norms.1.weight"),
        ("bbox_embed.6.layers.2.bias", "bbox_head.reg_branches.6.4.bias"),
        ("input_proj.3.1.weight", "neck.extra_convs.0.gn.weight"),
    ],
)
def test_names(official, ours):
    assert new_name(official) == ours


def test_other_checkpoints_are_refused(tmp_path, official_shapes):
    with pytest.raises(ValueError, match="unknown parameter 'transformer.reference_points.weight'"):
        convert_state_dict({"transformer.reference_points.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="class_embed.0.bias has 20 rows; expected 91"):
        convert_state_dict({"class_embed.0.bias": torch.zeros(20)})
    one, other = torch.zeros(91), torch.ones(91)
    with pytest.raises(ValueError, match="transformer.decoder.class_embed.0.bias differs from class_embed.0.bias"):
        convert_state_dict({"class_embed.0.bias": one, "transformer.decoder.class_embed.0.bias": other})
    model = MODELS.build(small("r50"))
    state = convert_state_dict(official_state(official_shapes["r50"], model))
    with pytest.raises(ValueError, match=r"first: query_embedding.weight has shape \(9, 256\), the model \(1800, 256"):
        fit(state | {"query_embedding.weight": torch.zeros(9, 256)}, model)
    del state["level_embed"]
    with pytest.raises(ValueError, match="fit the config: 1 of .* tensors differ, first: level_embed is missing"):
        fit(state, model)
    with pytest.raises(FileNotFoundError, match=r"checkpoint not found: .*x\.pth"):
        read_checkpoint(tmp_path / "x.pth", OFFICIAL)
    (tmp_path / "bad.pth").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"checkpoint .*bad\.pth cannot be read"):
        read_checkpoint(tmp_path / "bad.pth", OFFICIAL)
    torch.save({"state_dict": {}}, tmp_path / "mm.pth")
    with pytest.raises(ValueError, match="mm.pth has no state dict under 'model': not an official H-Def"):
        read_checkpoint(tmp_path / "mm.pth", OFFICIAL)
    with pytest.raises(ValueError, match="yolox_nano.py has the detector YOLOX; expected HDeformableDETR"):
        build_detector(DETECTORS / "yolox_nano.py", "HDeformableDETR")


def test_a_file_is_converted(tmp_path, official_shapes):
    config = tmp_path / "small.py"
    config.write_text(f"model = {small('r50').to_dict()!r}\n")
    model = build_detector(config, "HDeformableDETR")
    state = official_state(official_shapes["r50"], model)
    torch.save({"model": state, "epoch": 35, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "official.pth")
    count = convert_hdetr(tmp_path / "official.pth", tmp_path / "ours.pth", config)
    loaded = torch.load(tmp_path / "ours.pth", weights_only=True)["state_dict"]
    model.load_state_dict(loaded, strict=True)
    assert count == len(loaded)
    assert torch.equal(loaded["memory_trans_fc.weight"], state["transformer.enc_output.weight"])
