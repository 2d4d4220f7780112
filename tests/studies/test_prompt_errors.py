# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch

from ahcq_plugin.ptq import Recipe
from ahcq_plugin.studies import prompt_errors
from ahcq_plugin.zoo.items import scene_items


def test_errors_are_relative_and_every_mix_starts_from_floating_point(tiny_sam, monkeypatch):
    """Logits that are half as large again have an error of 0.5, whatever prompts them."""
    seen = []

    def half_again(sam, batches, recipe, forward):
        assert torch.is_grad_enabled()
        seen.append([sorted(item) for item in batches])
        larger = copy.deepcopy(sam)
        with torch.no_grad():
            for mlp in larger.mask_decoder.output_hypernetworks_mlps:
                for parameter in mlp.layers[-1].parameters():
                    parameter.mul_(1.5)
        return larger, None

    monkeypatch.setattr(prompt_errors, "quantize", half_again)
    images = list(scene_items(4, seed=4, size=64))
    mixes = {"boxes": {"box": 1.0}, "both": {"box": 0.5, "mask": 0.5}}
    errors = prompt_errors.prompt_errors(tiny_sam, mixes, images[:2], images[2:], Recipe.from_config("rtn"), most=3)
    for of_mix in errors.values():
        assert of_mix == pytest.approx(dict.fromkeys(("box", "click1", "click3", "mask", "grid"), 0.5), rel=1e-4)
    assert seen[0] == [["boxes", "image"]] * 2 and ["image", "labels", "masks", "points"] in seen[1]


def test_too_few_images_for_a_later_mix_are_refused_first(tiny_sam, monkeypatch):
    monkeypatch.setattr(prompt_errors, "quantize", lambda *args, **kwargs: pytest.fail("computed"))
    images, mixes = list(scene_items(2, seed=4, size=64)), {"boxes": {"box": 1.0}, "both": {"box": 0.5, "mask": 0.5}}
    with pytest.raises(ValueError, match="a share of 0.5 of 1 images gives '(box|mask)' none"):
        prompt_errors.prompt_errors(tiny_sam, mixes, images[:1], images[1:], Recipe.from_config("rtn"))
