# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch

from ahcq_plugin.zoo.sam import (
    CHECKPOINTS,
    WEIGHTS_DIR,
    box_forward,
    build_sam,
    load_weights,
    name_of_state,
    packaged_config,
)
from tests.conftest import TINY_SAM


def test_packaged_weights_load_in_single_precision_and_evaluation_mode():
    sam = build_sam("sam_tiny")
    assert not sam.training
    assert {p.dtype for p in sam.parameters()} == {torch.float32}
    stored = torch.load(WEIGHTS_DIR / "sam_tiny.pth", weights_only=True)
    assert {v.dtype for v in stored.values()} == {torch.float16}
    for name, value in sam.state_dict().items():
        assert torch.equal(value, stored[name].float()), name


def test_packaged_model_is_small():
    sam = build_sam("sam_tiny")
    assert sum(p.numel() for p in sam.parameters()) <= 8e6
    assert (WEIGHTS_DIR / "sam_tiny.pth").stat().st_size <= 16 * 2**20


def test_box_forward_is_the_published_forward_for_boxes(tiny_sam, tiny_items):
    for item in tiny_items:
        logits, quality = box_forward(tiny_sam, item)
        count = len(item["boxes"])
        assert logits.shape == (count, 1, 32, 32) and quality.shape == (count, 1)
        # Sam.forward normalises; undo it, so that it sees the same input
        image = item["image"][0] * tiny_sam.pixel_std + tiny_sam.pixel_mean
        with torch.no_grad():
            expected = tiny_sam([{"image": image, "boxes": item["boxes"], "original_size": (64, 64)}], False)[0]
        torch.testing.assert_close(logits, expected["low_res_logits"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(quality, expected["iou_predictions"], rtol=1e-4, atol=1e-5)


def test_published_names_end_in_the_start_of_their_md5():
    for name, entry in CHECKPOINTS.items():
        assert entry.file == f"sam_{name}_{entry.md5_prefix}.pth"
        assert entry.url.endswith(f"/segment_anything/{entry.file}")


def test_a_missing_published_file_says_where_to_get_and_put_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        build_sam("vit_b")
    assert "checkpoints/sam_vit_b_01ec64.pth" in str(error.value)
    assert CHECKPOINTS["vit_b"].url in str(error.value)
    assert "--dry-run" in str(error.value)


def test_a_file_with_a_published_name_and_other_bytes_is_refused(tmp_path):
    path = tmp_path / "sam_vit_b_01ec64.pth"
    torch.save({}, path)
    with pytest.raises(ValueError, match=r"is damaged: its MD5 is [0-9a-f]{32}, expected 01ec64"):
        build_sam("vit_b", path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_a_damaged_file_is_named_in_one_line(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot read .*weights.pth as a PyTorch state_dict") as error:
        build_sam(TINY_SAM, path)
    assert "\n" not in str(error.value)


def test_a_cut_off_file_is_named_in_one_line(tmp_path, tiny_sam):
    path = tmp_path / "weights.pth"
    torch.save(tiny_sam.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="cannot read .*weights.pth"):
        build_sam(TINY_SAM, path)


def test_weights_of_another_model_are_refused_with_the_first_difference(tmp_path, tiny_sam):
    path = tmp_path / "weights.pth"
    torch.save(tiny_sam.state_dict(), path)
    with pytest.raises(ValueError, match=r"does not fit the model: \d+ of \d+ tensors differ, first: .*pos_embed"):
        build_sam({**TINY_SAM, "embed_dim": 48}, path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="first: .* is missing"):
        build_sam(TINY_SAM, path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="holds list, expected a state_dict"):
        build_sam(TINY_SAM, path)


def test_half_precision_weights_are_widened(tmp_path, tiny_sam):
    path = tmp_path / "weights.pth"
    torch.save({k: v.half() for k, v in tiny_sam.state_dict().items()}, path)
    load_weights(tiny_sam, path)
    assert {p.dtype for p in tiny_sam.parameters()} == {torch.float32}


def test_wrong_arguments_are_explained():
    with pytest.raises(ValueError, match="unknown model 'vit_x', allowed: sam_tiny, vit_b, vit_l, vit_h"):
        build_sam("vit_x")
    with pytest.raises(ValueError, match=r"missing keys \['depth'\], unknown keys \['layers'\]"):
        build_sam({**{k: v for k, v in TINY_SAM.items() if k != "depth"}, "layers": 2}, False)
    with pytest.raises(ValueError, match="`image_size` must be a multiple of `patch_size`, got 60 and 8"):
        build_sam({**TINY_SAM, "image_size": 60}, False)
    with pytest.raises(ValueError, match="`checkpoint` is needed with a config"):
        build_sam(TINY_SAM)


def test_packaged_config_is_the_json_next_to_the_weights():
    assert packaged_config() == json.loads((WEIGHTS_DIR / "sam_tiny.json").read_text())["model"]


def test_weights_tell_whose_they_are(tiny_sam):
    assert name_of_state(build_sam("sam_tiny", checkpoint=False).state_dict()) == "sam_tiny"
    with torch.device("meta"):
        assert name_of_state(build_sam("vit_b", checkpoint=False).state_dict()) == "vit_b"
    with pytest.raises(ValueError, match=r"none of sam_tiny, vit_b, vit_l, vit_h: \(grid, width\) is \(8, 32\)"):
        name_of_state(tiny_sam.state_dict())
    with pytest.raises(ValueError, match="is None"):
        name_of_state({})
