# SPDX-License-Identifier: Apache-2.0
"""``bundle.json``: all that a program needs to know to run the graphs beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahcq_plugin.support.files import given_path, json_checksum, read_json, sha256_of, write_json

if TYPE_CHECKING:
    from torch import nn  # who runs graphs needs no PyTorch

FORMAT, SAM2_FORMAT = "ahcq_plugin.bundle/1", "ahcq_plugin.bundle.sam2/1"
ENCODER_FILE, DECODER_FILE, BUNDLE_FILE = "image_encoder.onnx", "mask_decoder.onnx", "bundle.json"
MEMORY_ATTENTION_FILE, MEMORY_ENCODER_FILE = "memory_attention.onnx", "memory_encoder.onnx"


def write_bundle(sam: nn.Module, path: str | Path, style: str) -> None:
    """Write ``bundle.json`` into the folder that has the graphs of ``sam``."""
    folder = Path(path)
    content = {
        "format": FORMAT,
        "style": style,
        "bytes": {name: (folder / name).stat().st_size for name in (ENCODER_FILE, DECODER_FILE)},
        "preprocessing": {
            "channels": "RGB, 0 to 255",
            "image_size": sam.image_encoder.img_size,
            "resize": "longest side to image_size, the other in proportion, rounded half up; bilinear, antialiased",
            "pixel_mean": sam.pixel_mean.flatten().tolist(),
            "pixel_std": sam.pixel_std.flatten().tolist(),
            "padding": "zeros at the bottom and the right, after (pixel - pixel_mean) / pixel_std",
        },
        "prompts": {
            "coordinates": "x, y in pixels of the resized image",
            "labels": {"none": -1, "background": 0, "foreground": 1, "box_top_left": 2, "box_bottom_right": 3},
            "padding_point": "points without a box are followed by one point (0, 0) with the label none",
            "mask_input_size": list(sam.prompt_encoder.mask_input_size),
        },
        "postprocessing": {
            "mask_threshold": float(sam.mask_threshold),
            "single_mask": [0, 1],
            "multiple_masks": [1, sam.mask_decoder.num_mask_tokens],
            "resize": "bilinear, half-pixel centres, to image_size; crop the padding; bilinear to the image's size",
        },
        "parity": [],
    }
    keep_bundle(content, folder)


def keep_bundle(content: Mapping[str, Any], path: str | Path) -> None:
    """Write ``bundle.json`` with the SHA-256 of the files that its ``bytes`` name, and of its own content."""
    digests = {name: file_digest(Path(path) / name) for name in content["bytes"]}
    sealed = {**content, "sha256": digests}
    write_json({**sealed, "checksum": json_checksum(sealed)}, Path(path) / BUNDLE_FILE)


def file_digest(path: Path) -> str:
    """SHA-256 of a file. FileNotFoundError: no such file."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}, which {BUNDLE_FILE} names; export the model again")
    return sha256_of(path)


def _check_content(content: Mapping[str, Any], file: Path) -> None:
    """ValueError for damage: a digest that does not match (files of before have none), or values of another kind."""
    if content.get("checksum", json_checksum(content)) != json_checksum(content):
        raise ValueError(f"{file} does not match its checksum: it is damaged, or was changed; export the model again")
    for name, digest in content.get("sha256", {}).items():
        if file_digest(file.with_name(name)) != digest:
            raise ValueError(
                f"{file.with_name(name)} does not match its SHA-256 in {file.name}; export the model again"
            )
    parts = [content.get(key) for key in ("preprocessing", "prompts", "postprocessing")]
    if not all(isinstance(part, dict) for part in parts) or type(parts[0].get("image_size")) is not int:
        raise ValueError(f"{file} lacks what to do with images and prompts; export the model again")


def read_bundle(path: str | Path, formats: Sequence[str] = (FORMAT, SAM2_FORMAT)) -> dict[str, Any]:
    """The JSON of a folder, of one of the formats.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it is not JSON, of another format, or damaged, as a file beside it may be.
    """
    file = given_path(path) / BUNDLE_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: `path` is the folder that export_onnx wrote")
    content = read_json(file, "export the model again")
    found = content.get("format") if isinstance(content, dict) else None
    if found not in formats:
        raise ValueError(
            f"{file}: its format is {found!r}, this reads {' or '.join(map(repr, formats))}: OnnxSam reads {FORMAT!r}, "
            f"OnnxSam2 {SAM2_FORMAT!r}; of an older version export the model again"
        )
    _check_content(content, file)
    return content


def note_parity(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put measured figures into the JSON of a folder, in the place of earlier ones."""
    content = {key: value for key, value in read_bundle(path).items() if key not in ("sha256", "checksum")}
    keep_bundle({**content, "parity": [dict(row) for row in rows]}, path)
