# SPDX-License-Identifier: Apache-2.0
"""The loaders of ahcq_plugin.zoo against the packages' own predictors; `make test-families` runs this where they are
installed: `pytest tests/families/loaders.py` (its name keeps it out of the suite, whose skips are counted)."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from ahcq_plugin.zoo.predict import make_batch, predict_masks
from ahcq_plugin.zoo.relatives import RELATIVES
from ahcq_plugin.zoo.sam import box_forward, build_sam
from tests.families.hugging_face import FAMILIES
from tests.families.sams import FAMILIES as SAMS

IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
BOXES = np.array([[5.0, 5.0, 40.0, 40.0], [20.0, 2.0, 60.0, 44.0]])


def _case(families, source, name):
    return next(f for f in families if (f.source, f.name) == (source, name)).case()


@pytest.mark.parametrize(("name", "row"), [("hq_vit_b", "HQ-SAM"), ("mobile_sam", "MobileSAM")])
def test_masks_are_those_of_the_packages_own_predictor(name, row, monkeypatch):
    package = pytest.importorskip(RELATIVES[name].package)
    family = next(f for f in SAMS if f.name == row)
    small, again = family.case().model, family.case().model
    monkeypatch.setitem(package.sam_model_registry, RELATIVES[name].size, lambda checkpoint: small)
    sam = build_sam(name, checkpoint=False)
    assert set(sam.state_dict()) == set(again.state_dict())
    got, quality = predict_masks(sam, IMAGE, BOXES)
    predictor = importlib.import_module(RELATIVES[name].package).SamPredictor(again)
    predictor.set_image(IMAGE)
    boxes = predictor.transform.apply_boxes_torch(torch.from_numpy(BOXES).float(), IMAGE.shape[:2])
    masks, expected, _ = predictor.predict_torch(None, None, boxes, multimask_output=False)
    assert (got == masks[:, 0].numpy()).mean() > 0.999
    np.testing.assert_allclose(quality, expected[:, 0].numpy(), rtol=1e-3, atol=1e-4)


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("transformers")
    model = _case(FAMILIES, "transformers", "SAM").model
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


def test_a_folder_of_hugging_face_gives_its_own_masks(folder):
    path, model = folder
    sam = build_sam(f"hf:{path}")
    assert {name.removeprefix("model.") for name in sam.state_dict()} >= set(dict(model.named_parameters()))
    item = make_batch(sam, IMAGE, BOXES)
    with torch.no_grad():
        masks, quality = box_forward(sam, item)
        expected = model(pixel_values=item["image"], input_boxes=item["boxes"][None].clone(), multimask_output=False)
    torch.testing.assert_close(masks, expected.pred_masks[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quality, expected.iou_scores[0], rtol=1e-4, atol=1e-5)


def test_random_weights_of_a_folders_config(folder):
    path, model = folder
    sam = build_sam(f"hf:{path}", checkpoint=False)
    assert {k: v.shape for k, v in sam.model.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_what_is_not_there_or_no_sam_is_said_in_one_line(folder, tmp_path, monkeypatch):
    path, _ = folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (tmp_path / "absent", "facebook/no-such-sam"):
        with pytest.raises(FileNotFoundError, match="without a network, copy config.json"):
            build_sam(f"hf:{name}")
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"is a folder .*model.safetensors"):
        build_sam(f"hf:{path}")
    other = _case(FAMILIES, "transformers", "SAM 2").model
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is a 'sam2', only 'sam'"):
        build_sam(f"hf:{tmp_path / 'other'}")
