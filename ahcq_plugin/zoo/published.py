# SPDX-License-Identifier: Apache-2.0
"""Weight files that others publish: their names, where they are to be had, whether a file is one of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ahcq_plugin.support.files import sha256_of

_META = "https://dl.fbaipublicfiles.com"
_MMDET = "https://download.openmmlab.com/mmdetection"
_HDETR = "https://github.com/HDETR/H-Deformable-DETR/releases/download/v0.1"
_HQ = "https://huggingface.co/lkeab/hq-sam/resolve/main"
_HYBRID = "hybrid_branch_lambda1_group6_t1500"
_REFINED = "dp0_mqs_lft_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage_36eps.pth"


@dataclass(frozen=True)
class PublishedFile:
    """A file that configs name.

    Args:
        name: as ``tools/fetch_weights.py`` takes it; where there is one, the config under ``_base_/sam`` or
            ``_base_/detectors``.
        file: name below ``checkpoints/``, where configs look.
        url: of the published file.
        sha256: of the published file, or as many of its first digits as are published; empty: none are.
        size: of the published file in bytes, where it is known.
        convert: '' or who makes ``file`` of it: 'hdetr', 'dino', 'yolox' (from ONNX).
        model: '' or the SAM that it belongs to, as ``build_sam`` and ``build_sam2`` name it.
    """

    name: str
    file: str
    url: str
    sha256: str = ""
    size: int | None = None
    convert: str = ""
    model: str = ""

    @property
    def published(self) -> str:
        """Name of the published file."""
        return self.url.rsplit("/", 1)[1]


def _sam(size: str, file: str, bytes_: int, sha256: str) -> PublishedFile:
    return PublishedFile(f"sam_{size}", file, f"{_META}/segment_anything/{file}", sha256, bytes_, model=f"vit_{size}")


def _sam2(name: str, folder: str, file: str) -> PublishedFile:
    return PublishedFile(name, file, f"{_META}/segment_anything_2/{folder}/{file}", model=name)


def _openmmlab(name: str, folder: str, file: str) -> PublishedFile:
    """OpenMMLab's file names end in the first eight digits of the SHA-256."""
    return PublishedFile(name, file, f"{folder}/{file}", file.removesuffix(".pth").rsplit("-", 1)[1])


def _hdetr(backbone: str, file: str) -> PublishedFile:
    return PublishedFile(f"hdetr_{backbone}", f"hdetr_{backbone}.pth", f"{_HDETR}/{file}", convert="hdetr")


_ALL = (
    _sam(
        "b",
        "sam_vit_b_01ec64.pth",
        375042383,
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    _sam(
        "l",
        "sam_vit_l_0b3195.pth",
        1249524607,
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    _sam(
        "h",
        "sam_vit_h_4b8939.pth",
        2564550879,
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    _sam2("sam2_t", "072824", "sam2_hiera_tiny.pt"),
    _sam2("sam2_s", "072824", "sam2_hiera_small.pt"),
    _sam2("sam2_bp", "072824", "sam2_hiera_base_plus.pt"),
    _sam2("sam2_l", "072824", "sam2_hiera_large.pt"),
    _sam2("sam2.1_t", "092824", "sam2.1_hiera_tiny.pt"),
    _sam2("sam2.1_s", "092824", "sam2.1_hiera_small.pt"),
    _sam2("sam2.1_bp", "092824", "sam2.1_hiera_base_plus.pt"),
    _sam2("sam2.1_l", "092824", "sam2.1_hiera_large.pt"),
    *(
        PublishedFile(f"hq_sam_{s}", f"sam_hq_vit_{s}.pth", f"{_HQ}/sam_hq_vit_{s}.pth", model=f"hq_vit_{s}")
        for s in "blh"
    ),
    PublishedFile(
        "mobile_sam",
        "mobile_sam.pt",
        "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
        model="mobile_sam",
    ),
    _openmmlab(
        "faster_rcnn_r50",
        f"{_MMDET}/v2.0/faster_rcnn/faster_rcnn_r50_fpn_2x_coco",
        "faster_rcnn_r50_fpn_2x_coco_bbox_mAP-0.384_20200504_210434-a5d8aa15.pth",
    ),
    _openmmlab(
        "yolox_l",
        f"{_MMDET}/v2.0/yolox/yolox_l_8x8_300e_coco",
        "yolox_l_8x8_300e_coco_20211126_140236-d3bd2b23.pth",
    ),
    _openmmlab(
        "dino_r50",
        f"{_MMDET}/v3.0/dino/dino-4scale_r50_8xb2-12e_coco",
        "dino-4scale_r50_8xb2-12e_coco_20221202_182705-55b2bba2.pth",
    ),
    _openmmlab(
        "dino_swin_l",
        "https://github.com/RistoranteRist/mmlab-weights/releases/download/dino-swinl",
        "dino-5scale_swin-l_8xb2-36e_coco-5486e051.pth",
    ),
    _hdetr("r50", f"r50_{_HYBRID}_{_REFINED}"),
    _hdetr("swin_t", f"swin_tiny_{_HYBRID}_{_REFINED}"),
    _hdetr("swin_l", f"decay0.05_drop_path0.5_swin_large_{_HYBRID}_n900_{_REFINED}"),
    PublishedFile(
        "dino_focalnet_l",
        "dino_focalnet_l.pth",
        "https://projects4jw.blob.core.windows.net/focalnet/release/detection/"
        "focalnet_large_fl4_o365_finetuned_on_coco.pth",
        convert="dino",
    ),
    PublishedFile(
        "yolox_nano",
        "yolox_nano.pth",
        "https://github.com/Megvii-BaseDetection/YOLOX/releases/download/0.1.1rc0/yolox_nano.onnx",
        convert="yolox",
    ),
)

#: All published files that configs and builders name, by name.
PUBLISHED_FILES = {entry.name: entry for entry in _ALL}


def of_model(model: str) -> PublishedFile | None:
    """Weights of the SAM or SAM 2 with this name; None: none are published for it."""
    return next((entry for entry in _ALL if entry.model and entry.model == model), None)


def of_path(path: str | Path) -> PublishedFile | None:
    """What a file that a config names is or is made from, by its file name; None: nothing known here."""
    return next((entry for entry in _ALL if entry.file == Path(path).name), None)


def record_of(path: Path) -> Path:
    """Where the digest of a file stands that nobody has published in full, noted when it was first fetched."""
    return path.with_name(f"{path.name}.sha256")


def damage(path: Path, entry: PublishedFile, convert: bool = False) -> str:
    """What tells a file from the published one, and from what was noted when it was fetched, in words; '' when nothing
    does, as far as anything is known. With ``convert`` it was made from the published one: only the note counts."""
    size, record = path.stat().st_size, record_of(path)
    if entry.size is not None and size != entry.size and not convert:
        return f"it has {size:,} bytes, the published file {entry.size:,}"
    published = "" if convert else entry.sha256
    noted = record.read_text(encoding="utf-8", errors="replace").split(" ")[0] if record.is_file() else ""
    if not (published or noted):
        return ""
    sha256 = sha256_of(path)
    if not sha256.startswith(published):
        return f"its SHA-256 is {sha256}, published is {published}"
    return f"its SHA-256 is {sha256}, {record.name} says {noted}" if record.is_file() and sha256 != noted else ""
