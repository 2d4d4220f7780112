# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace

import pytest
import torch

from ahcq_plugin.zoo.checkpoints import WEIGHTS_DIR, default_checkpoint, load_weights, packaged_config
from ahcq_plugin.zoo.published import PUBLISHED_FILES, of_model, of_path
from ahcq_plugin.zoo.sam import CHECKPOINTS, box_forward, build_sam, name_of_state
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
    for (name, entry), md5_prefix in zip(CHECKPOINTS.items(), ("01ec64", "0b3195", "4b8939"), strict=True):
        assert entry.file == f"sam_{name}_{md5_prefix}.pth"
        assert entry.url.endswith(f"/segment_anything/{entry.file}")


def test_one_table_knows_every_published_file_and_its_model():
    assert len({entry.file for entry in PUBLISHED_FILES.values()}) == len(PUBLISHED_FILES)
    for entry in PUBLISHED_FILES.values():
        assert of_path(f"somewhere/{entry.file}") is entry and entry.url.startswith("https://")
        assert not entry.model or of_model(entry.model) is entry
    assert of_model("") is of_model("sam_tiny") is of_path("x.pth") is None


def test_every_named_model_has_a_place_for_its_weights():
    assert default_checkpoint("sam_tiny").is_file() and default_checkpoint("sam2_tiny").is_file()
    assert str(default_checkpoint("vit_h")) == "checkpoints/sam_vit_h_4b8939.pth"
    assert str(default_checkpoint("sam2.1_bp")) == "checkpoints/sam2.1_hiera_base_plus.pt"
    assert str(default_checkpoint({"name": "sam2_t", "image_size": 512})) == "checkpoints/sam2_hiera_tiny.pt"
    for unknown in ("sam3", {"image_size": 64}):
        with pytest.raises(
            ValueError, match="no weights are known for model .*, only for sam_tiny, sam2_tiny, sam_tiny_hard, vit_b, "
        ):
            default_checkpoint(unknown)


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
    with pytest.raises(
        ValueError, match=r"is damaged: it has .* bytes, the published file 375,042,383; download it again"
    ):
        build_sam("vit_b", path)
    entry = replace(CHECKPOINTS["vit_b"], size=None)
    with pytest.raises(ValueError, match=r"is damaged: its SHA-256 is [0-9a-f]{64}, published is ec2df627"):
        load_weights(torch.nn.Identity(), path, entry)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_a_damaged_file_is_named_in_one_line(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint .*weights\.pth cannot be read") as error:
        build_sam(TINY_SAM, path)
    assert "\n" not in str(error.value)


def test_a_cut_off_file_is_named_in_one_line(tmp_path, tiny_sam):
    path = tmp_path / "weights.pth"
    torch.save(tiny_sam.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"checkpoint .*weights\.pth cannot be read"):
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
    with pytest.raises(
        ValueError, match="unknown model 'vit_x', allowed: sam_tiny, sam_tiny_hard, vit_b, vit_l, vit_h"
    ):
        build_sam("vit_x")
    for name in ("sam2_t", "sam2.1_hiera_t"):
        with pytest.raises(ValueError, match=f"{name}' is a SAM 2: build it with ahcq_plugin.zoo.sam2.build_sam2"):
            build_sam(name)
    with pytest.raises(ValueError, match=r"missing keys \['depth'\], unknown keys \['layers'\]"):
        build_sam({**{k: v for k, v in TINY_SAM.items() if k != "depth"}, "layers": 2}, False)
    with pytest.raises(ValueError, match="`image_size` must be a multiple of `patch_size`, got 60 and 8"):
        build_sam({**TINY_SAM, "image_size": 60}, False)
    with pytest.raises(ValueError, match="`checkpoint` is needed with a config"):
        build_sam(TINY_SAM)
    for name in ("sam_tiny", "vit_b", TINY_SAM):
        with pytest.raises(ValueError, match="`checkpoint` must be a path, None or False, got True"):
            build_sam(name, True)


def test_packaged_config_is_the_json_next_to_the_weights():
    assert packaged_config() == json.loads((WEIGHTS_DIR / "sam_tiny.json").read_text())["model"]


def test_weights_tell_whose_they_are(tiny_sam):
    for name in ("sam_tiny", "sam_tiny_hard"):
        assert name_of_state(build_sam(name, checkpoint=False).state_dict()) == name
    with torch.device("meta"):
        assert name_of_state(build_sam("vit_b", checkpoint=False).state_dict()) == "vit_b"
    with pytest.raises(ValueError, match=r"none of sam_tiny, vit_b, vit_l, vit_h: \(grid, width\) is \(8, 32\)"):
        name_of_state(tiny_sam.state_dict())
    with pytest.raises(ValueError, match="is None"):
        name_of_state({})
