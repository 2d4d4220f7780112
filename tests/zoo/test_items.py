# SPDX-License-Identifier: Apache-2.0
import io
import json

import numpy as np
import pytest
from PIL import Image

from ahcq_plugin.zoo.coco import check_coco
from ahcq_plugin.zoo.images import decode_image
from ahcq_plugin.zoo.items import read_image
from ahcq_plugin.zoo.scenes import write_coco
from tests.robustness.data_cases import png_header

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def test_an_image_comes_as_rgb_rotated_by_its_exif_flag(tmp_path):
    content = io.BytesIO()
    Image.fromarray(PIXELS).save(content, format="PNG")
    np.testing.assert_array_equal(decode_image(content.getvalue(), "x.png"), PIXELS)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/x.png").write_bytes(content.getvalue())
    np.testing.assert_array_equal(read_image(tmp_path, "train/x.png"), PIXELS)
    content, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(PIXELS).save(content, format="JPEG", exif=exif)
    turned = decode_image(content.getvalue(), "x.jpg")
    assert turned.shape == (9, 6, 3)
    grey = io.BytesIO()
    Image.fromarray(PIXELS[..., 0]).save(grey, format="PNG")
    assert (decode_image(grey.getvalue(), "grey.png") == PIXELS[..., :1]).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_a_part_of_an_image_is_refused(kind):
    content, pixels = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, format=kind)
    whole = content.getvalue()
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(ValueError, match="x.img is not a readable image"):
            decode_image(whole[: int(share * len(whole))], "x.img")


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_what_is_no_image_is_named(tmp_path, content):
    with pytest.raises(ValueError, match="x.png is not a readable image"):
        decode_image(content, "x.png")
    with pytest.raises(FileNotFoundError, match="no image .*x.png"):
        read_image(tmp_path, "x.png")


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_the_data_set_names_what_is_no_image(tmp_path, content):
    pytest.importorskip("mmdet", reason="needs MMDetection")
    from ahcq_plugin.mm.data.images import read_rgb
    from ahcq_plugin.mm.errors import DataError

    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DataError, match="x.png is not a readable image"):
        read_rgb(tmp_path / "x.png")


def test_boxes_that_are_left_out_are_counted(tmp_path, caplog):
    folder = write_coco(tmp_path / "coco", 2, seed=5).parent
    content = json.loads((folder / "instances.json").read_text())
    content["annotations"][0]["bbox"] = [5, 5, 0, 9]
    content["annotations"][1]["bbox"] = [-50, 5, 20, 9]
    (folder / "instances.json").write_text(json.dumps(content))
    check_coco(str(folder / "instances.json"), str(folder / "images"), masks=False)
    count = len(content["annotations"])
    assert f"1 of {count} boxes have no area (first: annotation {content['annotations'][0]['id']})" in caplog.text
    assert f"1 of {count} boxes lie outside of their image" in caplog.text


def test_an_image_whose_header_promises_too_much_is_no_image(tmp_path):
    png_header(tmp_path / "x.png")
    with pytest.raises(ValueError, match="x.png is not a readable image"):
        decode_image((tmp_path / "x.png").read_bytes(), tmp_path / "x.png")
