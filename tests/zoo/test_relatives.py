# SPDX-License-Identifier: Apache-2.0
"""SAMs of other packages: errors that say what to install, and the translation between their interface and SAM's.

The packages themselves are in tests/families (`make test-families`); here stand-ins have their interface.
"""

from __future__ import annotations

import copy
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ahcq_plugin.zoo.checkpoints import default_checkpoint
from ahcq_plugin.zoo.hugging_face import HuggingFaceSam
from ahcq_plugin.zoo.predict import make_batch, predict_masks
from ahcq_plugin.zoo.sam import box_forward, build_sam, name_of_state
from tests.conftest import TINY_SAM


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hq_vit_b", "pip install segment-anything-hq timm"),
        ("mobile_sam", r"pip install git\+https://github.com/ChaoningZhang/MobileSAM.git"),
        ("hf:facebook/sam-vit-base", r"pip install 'ahcq_plugin\[hf\]'"),
    ],
)
def test_a_missing_package_is_named_with_its_installation(name, message, monkeypatch):
    for package in ("segment_anything_hq", "mobile_sam", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ValueError, match=message):
        build_sam(name, checkpoint=False)


def test_missing_weights_are_named_before_the_package_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "segment_anything_hq", None)
    with pytest.raises(FileNotFoundError, match="lkeab/hq-sam/resolve/main/sam_hq_vit_l.pth"):
        build_sam("hq_vit_l")
    assert str(default_checkpoint("mobile_sam")) == "checkpoints/mobile_sam.pt"


def test_unknown_names_list_the_relatives():
    with pytest.raises(ValueError, match=r"mobile_sam.*hf: and a folder"):
        build_sam("hq_vit_x")


class _EarlyEncoder(nn.Module):
    """Returns the embedding, and what an early layer had, channels last."""

    img_size = TINY_SAM["image_size"]

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        return self.encoder(x), [self.encoder.patch_embed(x), None]


class _EarlyDecoder(nn.Module):
    """Adds a projection of the early features to the embedding."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder, self.transformer_dim = decoder, TINY_SAM["prompt_embed_dim"]
        self.project = nn.Linear(TINY_SAM["embed_dim"], self.transformer_dim)

    def forward(self, image_embeddings, interm_embeddings, hq_token_only, **given):
        assert hq_token_only is False
        early = self.project(interm_embeddings[0]).permute(0, 3, 1, 2)
        return self.decoder(image_embeddings=image_embeddings + early, **given)


@pytest.fixture
def hq_package(tiny_sam, monkeypatch):
    sam = copy.deepcopy(tiny_sam)
    sam.image_encoder, sam.mask_decoder = _EarlyEncoder(sam.image_encoder), _EarlyDecoder(sam.mask_decoder)
    sam.requires_grad_(False)
    package = ModuleType("segment_anything_hq")
    package.sam_model_registry = {"vit_b": lambda checkpoint: sam}
    monkeypatch.setitem(sys.modules, "segment_anything_hq", package)
    return copy.deepcopy(sam)


def test_early_features_reach_the_decoder_through_sams_interface(hq_package, tiny_items):
    keys = set(hq_package.state_dict())
    sam = build_sam("hq_vit_b", checkpoint=False)
    assert set(sam.state_dict()) == keys and all(p.requires_grad for p in sam.parameters())
    for item in tiny_items:
        with torch.no_grad():
            got = box_forward(copy.deepcopy(sam), item)  # the hooks go along with a copy
            embedding, early = hq_package.image_encoder(item["image"])
            sparse, dense = hq_package.prompt_encoder(points=None, boxes=item["boxes"], masks=None)
            expected = hq_package.mask_decoder(
                image_embeddings=embedding,
                interm_embeddings=early,
                hq_token_only=False,
                image_pe=hq_package.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
        for one, other in zip(got, expected, strict=True):  # the embedding lies otherwise in memory: not the same bits
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_quantized_file_of_a_relative_is_not_taken_for_a_sam():
    table = {"image_encoder.pos_embed": torch.zeros(1, 64, 64, 768)}
    assert name_of_state(table) == "vit_b"
    assert name_of_state(table | {"mask_decoder.hf_token.weight": torch.zeros(1)}) == "hq_vit_b"
    assert name_of_state({"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(1)}) == "mobile_sam"


class _HuggingFaceModel(nn.Module):
    """A SAM called as ``transformers`` calls its own: batch and objects are two dimensions, corners move in place."""

    def __init__(self, sam: nn.Module):
        super().__init__()
        self.sam = sam
        self.config = SimpleNamespace(vision_config=SimpleNamespace(image_size=TINY_SAM["image_size"]))

    def vision_encoder(self, pixels):
        return self.sam.image_encoder(pixels), None

    def get_image_wide_positional_embeddings(self):
        return self.sam.prompt_encoder.get_dense_pe()

    def prompt_encoder(self, input_points, input_labels, input_boxes, input_masks):
        points = None if input_points is None else (input_points[:, 0], input_labels[:, 0])
        boxes = None if input_boxes is None else input_boxes[:, 0].clone()
        if input_boxes is not None:
            input_boxes += 0.5
        sparse, dense = self.sam.prompt_encoder(points, boxes, input_masks)
        return (sparse[:, None] if sparse.shape[1] else None), dense

    def mask_decoder(
        self,
        image_embeddings,
        image_positional_embeddings,
        sparse_prompt_embeddings,
        dense_prompt_embeddings,
        multimask_output,
    ):
        each = zip(image_embeddings, sparse_prompt_embeddings[:, 0], dense_prompt_embeddings, strict=True)
        outputs = [
            self.sam.mask_decoder(
                image[None], image_positional_embeddings[:1], sparse[None], dense[None], multimask_output
            )
            for image, sparse, dense in each
        ]
        masks, quality = (torch.stack(part) for part in zip(*outputs, strict=True))
        return masks, quality, None  # some versions return attention too


@pytest.mark.parametrize("multimask", [False, True])
def test_prompts_and_masks_pass_through_hugging_faces_interface(tiny_sam, tiny_items, multimask):
    adapted = HuggingFaceSam(_HuggingFaceModel(tiny_sam)).eval()
    item = tiny_items[0]
    boxes = item["boxes"]
    clicks = (boxes.reshape(-1, 2, 2), torch.ones(len(boxes), 2))
    masks = torch.randn(len(boxes), 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for prompts in ({"boxes": boxes}, {"points": clicks}, {"points": clicks, "boxes": boxes, "masks": masks}):
        given = {"points": None, "boxes": None, "masks": None} | prompts
        outputs = []
        for sam in (adapted, tiny_sam):
            with torch.no_grad():
                sparse, dense = sam.prompt_encoder(**given)
                embedding, position = sam.image_encoder(item["image"]), sam.prompt_encoder.get_dense_pe()
                outputs.append(sam.mask_decoder(embedding, position, sparse, dense, multimask))
        for got, expected in zip(*outputs, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_an_image_is_prepared_and_segmented_as_by_sam(tiny_sam):
    adapted = HuggingFaceSam(_HuggingFaceModel(tiny_sam)).eval()
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    boxes = np.array([[5.0, 5.0, 30.0, 35.0], [20.0, 2.0, 55.0, 38.0]])
    for key, value in make_batch(tiny_sam, image, boxes).items():
        torch.testing.assert_close(make_batch(adapted, image, boxes)[key], value, rtol=1e-5, atol=1e-5)
    before = boxes.copy()
    masks, quality = predict_masks(adapted, image, boxes)
    expected_masks, expected_quality = predict_masks(tiny_sam, image, boxes)
    assert masks.shape == (2, 40, 60) and (masks == expected_masks).mean() > 0.999
    np.testing.assert_allclose(quality, expected_quality, rtol=1e-4, atol=1e-5)
    assert np.array_equal(boxes, before)
    assert {name.partition(".")[0] for name in adapted.state_dict()} == {"model"}
