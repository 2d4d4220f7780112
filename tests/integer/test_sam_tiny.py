# SPDX-License-Identifier: Apache-2.0
"""The packaged SAM on integers: every matmul on real images, and masks as good as the fake-quantized model's (slow)."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from ahcq_plugin import quantize
from ahcq_plugin.export import make_spec
from ahcq_plugin.export.compare import golden_forward, mask_overlap
from ahcq_plugin.integer import to_integer
from ahcq_plugin.metrics.mask_iou import mask_iou
from ahcq_plugin.zoo.items import coco_items, scene_items
from ahcq_plugin.zoo.predict import make_batch, predict_masks
from ahcq_plugin.zoo.sam import box_forward, build_sam
from tests.integer.cases import BACKENDS
from tests.integer.comparing import differing_matmuls

BOXES, PHOTOGRAPHS, SCENES = 4, 8, 128


@cache
def quantized(recipe: str, bits: int) -> nn.Module:
    """sam_tiny, calibrated on two scenes, not reconstructed."""
    sam = build_sam("sam_tiny")
    batches = [make_batch(sam, item.image, item.boxes[:BOXES]) for item in scene_items(2, seed=3)]
    settings = {"name": recipe, "granularity": "none"}
    return quantize(sam, batches, settings, bits, bits, forward=box_forward, progress=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "bits"), [(r, b) for r in ("rtn", "adaround", "brecq", "qdrop", "ptq4sam", "ahcq") for b in (8, 6, 4)]
)
def test_every_matmul_on_photographs_equals_the_golden_model(recipe, bits, shared_data) -> None:
    qmodel = quantized(recipe, bits)
    items = itertools.islice(coco_items(shared_data / "coco_val"), PHOTOGRAPHS)
    batches = [make_batch(qmodel, item.image, item.boxes[:BOXES]) for item in items]
    compared, wrong = differing_matmuls(qmodel, to_integer(qmodel), batches, box_forward, BACKENDS[0])
    assert len(batches) == PHOTOGRAPHS and compared > 80 * PHOTOGRAPHS and not wrong, wrong


@pytest.mark.slow
def test_masks_are_those_of_the_chained_golden_model() -> None:
    """Both sum exactly; the fake-quantized model's roundings turn codes at boundaries, which 4 bits amplify."""
    qmodel = quantized("ahcq", 4)
    spec, integer = make_spec(qmodel), to_integer(qmodel)
    for item in itertools.islice(scene_items(20, seed=9), 2):
        batch = make_batch(qmodel, item.image, item.boxes[:BOXES])
        with torch.no_grad():
            wanted, found = golden_forward(qmodel, spec, batch, box_forward)[0], box_forward(integer, batch)[0]
        assert float(mask_overlap(wanted, found)[0].min()) >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "bits"), [("ahcq", 4), ("rtn", 8)])
def test_masks_are_as_good_as_those_of_the_fake_quantized_model(recipe, bits) -> None:
    qmodel = quantized(recipe, bits)
    models = {"fake": qmodel, "integer": to_integer(qmodel)}
    ious: dict[str, list[float]] = {name: [] for name in models}
    for item in itertools.islice(scene_items(2 * SCENES, seed=9), SCENES):
        masks = {name: predict_masks(model, item.image, item.boxes)[0] for name, model in models.items()}
        for name, found in masks.items():
            ious[name] += mask_iou(found, np.stack(item.masks)).tolist()
    means = {name: float(np.mean(values)) for name, values in ious.items()}
    assert abs(means["integer"] - means["fake"]) <= 0.005, means
