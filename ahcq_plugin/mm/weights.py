# SPDX-License-Identifier: Apache-2.0
"""Published weights that configs need: their names, where they are to be had, whether a file is one of them."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config
from tqdm import tqdm

from ahcq_plugin.zoo.sam import CHECKPOINTS

CHUNK = 2**20
_MMDET = "https://download.openmmlab.com/mmdetection"
_HDETR = "https://github.com/HDETR/H-Deformable-DETR/releases/download/v0.1"
_HYBRID = "hybrid_branch_lambda1_group6_t1500"
_REFINED = "dp0_mqs_lft_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage_36eps.pth"


@dataclass(frozen=True)
class WeightFile:
    """A file that configs name.

    Args:
        name: as ``tools/fetch_weights.py`` takes it: the config under ``_base_/sam`` or ``_base_/detectors``.
        file: name below ``checkpoints/``, where configs look.
        url: of the published file.
        sha256: of the published file, or as many of its first digits as are published; empty: none are.
        size: of the published file in bytes, where it is known.
        convert: '' or who makes ``file`` of it: 'hdetr', 'dino', 'yolox' (from ONNX).
    """

    name: str
    file: str
    url: str
    sha256: str = ""
    size: int | None = None
    convert: str = ""

    @property
    def published(self) -> str:
        """Name of the published file."""
        return self.url.rsplit("/", 1)[1]


def _openmmlab(name: str, folder: str, file: str) -> WeightFile:
    """OpenMMLab's file names end in the first eight digits of the SHA-256."""
    return WeightFile(name, file, f"{folder}/{file}", file.removesuffix(".pth").rsplit("-", 1)[1])


def _hdetr(backbone: str, file: str) -> WeightFile:
    return WeightFile(f"hdetr_{backbone}", f"hdetr_{backbone}.pth", f"{_HDETR}/{file}", convert="hdetr")


def _sam(size: str, bytes_: int, sha256: str) -> WeightFile:
    source = CHECKPOINTS[f"vit_{size}"]
    return WeightFile(f"sam_{size}", source.file, source.url, sha256, bytes_)


WEIGHTS = {
    entry.name: entry
    for entry in (
        _sam("b", 375042383, "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
        _sam("l", 1249524607, "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
        _sam("h", 2564550879, "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
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
        WeightFile(
            "dino_focalnet_l",
            "dino_focalnet_l.pth",
            "https://projects4jw.blob.core.windows.net/focalnet/release/detection/"
            "focalnet_large_fl4_o365_finetuned_on_coco.pth",
            convert="dino",
        ),
        WeightFile(
            "yolox_nano",
            "yolox_nano.pth",
            "https://github.com/Megvii-BaseDetection/YOLOX/releases/download/0.1.1rc0/yolox_nano.onnx",
            convert="yolox",
        ),
    )
}


def wanted(names: Iterable[str]) -> list[WeightFile]:
    """Entries of names, or of all that a config file (``*.py``) needs.

    Raises:
        ValueError, FileNotFoundError: an unknown name, no such config, or one without such files.
    """
    found: dict[str, WeightFile] = {}
    for name in names:
        if name.endswith(".py"):
            found |= {entry.name: entry for entry in _of_config(name)}
        elif name in WEIGHTS:
            found[name] = WEIGHTS[name]
        else:
            raise ValueError(f"unknown weights {name!r}; allowed: {', '.join(WEIGHTS)}, or the path of a config")
    return list(found.values())


def _of_config(path: str) -> list[WeightFile]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config {path}")
    cfg = Config.fromfile(path)
    files = {Path(name).name for name in (cfg.get("load_from"), (cfg.get("sam") or {}).get("checkpoint")) if name}
    found = [entry for entry in WEIGHTS.values() if entry.file in files]
    if not found:
        raise ValueError(f"{path} needs no weights that are known here")
    return found


def damage(path: Path, entry: WeightFile) -> str:
    """What tells a file from the published one, in words; '' when nothing does, as far as anything is published."""
    size = path.stat().st_size
    if entry.size is not None and size != entry.size:
        return f"it has {size:,} bytes, the published file {entry.size:,}"
    if not entry.sha256:
        return ""
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    return "" if found.startswith(entry.sha256) else f"its SHA-256 is {found}, published is {entry.sha256}"


def state_of(entry: WeightFile, folder: Path) -> str:
    """``missing``, ``ok``, ``there`` (nothing published to compare with, or converted), or ``damaged: ...``."""
    path = folder / entry.file
    if not path.is_file():
        return "missing"
    if entry.convert or not (entry.sha256 or entry.size):
        return "there"
    found = damage(path, entry)
    return f"damaged: {found}" if found else "ok"


def download(entry: WeightFile, path: Path, progress: bool = True) -> None:
    """Fetch the published file into ``path``; what an interrupted download left (``path``.part) is gone on with.

    Raises:
        ConnectionError: the server cannot be reached, refuses, or stops early.
        ValueError: what came is not the published file; it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(entry.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            if have and answer.status != 206:  # a server that does not know ranges sends everything
                have = 0
            length = answer.headers.get("Content-Length")
            total = None if length is None else have + int(length)
            _write(answer, part, have, total, entry.published, progress)
    except urllib.error.HTTPError as error:
        if not (error.code == 416 and have):  # nothing is left to send: the part is the whole, or not of this file
            raise ConnectionError(f"{entry.url}: {error.code} {error.reason}") from error
        total = have
    except OSError as error:
        raise ConnectionError(
            f"cannot fetch {entry.url} ({getattr(error, 'reason', error)}); without a network, download it elsewhere "
            f"and put it at {path}"
        ) from error
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(
            f"{entry.url} stopped at {part.stat().st_size:,} of {total:,} bytes; run it again to go on"
        )
    found = damage(part, entry)
    if found:
        part.unlink()
        raise ValueError(f"{entry.url} is not what was published: {found}; removed, try again")
    part.replace(path)


def _write(answer, part: Path, have: int, total: int | None, name: str, progress: bool) -> None:
    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=name[:40], disable=not progress)
    with bar, part.open("ab" if have else "wb") as out:
        while chunk := answer.read(CHUNK):
            out.write(chunk)
            bar.update(len(chunk))


def fetch(entry: WeightFile, folder: Path, configs: Path, progress: bool = True) -> str:
    """Have ``folder/entry.file``: there and whole, or downloaded, verified and converted.

    Args:
        configs: folder ``mm_configs``; converters build the detector from it.

    Returns: what was done, in words.
    Raises:
        ConnectionError, ValueError: see ``download``; a file that is there is damaged; a converter's error.
    """
    state, path = state_of(entry, folder), folder / entry.file
    if state.startswith("damaged"):
        raise ValueError(f"{path} is {state}; remove it to fetch it again")
    if state != "missing":
        return f"{path}: {state}"
    raw = folder / entry.published
    if not (entry.convert and raw.is_file()):
        download(entry, raw, progress)
    if entry.convert == "hdetr":
        from ahcq_plugin.mm.detectors.convert_hdetr import convert_hdetr

        convert_hdetr(raw, path, configs / "_base_" / "detectors" / f"{entry.name}.py")
    elif entry.convert == "dino":
        from ahcq_plugin.mm.detectors.convert_dino import convert_dino

        convert_dino(raw, path, configs / "_base_" / "detectors" / f"{entry.name}.py")
    elif entry.convert == "yolox":
        from ahcq_plugin.mm.detectors.convert_yolox import convert_yolox

        convert_yolox(raw, path)
    return f"{path}: {'converted from ' + raw.name if entry.convert else 'fetched'}"
