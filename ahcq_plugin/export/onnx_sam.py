# SPDX-License-Identifier: Apache-2.0
"""From an image and prompts to masks with the two ONNX graphs of a SAM, of any style: numpy, Pillow and a runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ahcq_plugin.export.onnx_bundle import DECODER_FILE, ENCODER_FILE, FORMAT, read_bundle
from ahcq_plugin.export.onnx_resize import resize_bilinear
from ahcq_plugin.export.onnx_runtimes import open_graph


class OnnxSam:
    """A folder that ``export_onnx`` wrote, used like ``SamPredictor``: ``set_image``, then ``predict``.

    Args:
        path: the folder.
        threads: of the runtime within an operator; 0: as many as it likes.
        runtime: ``onnxruntime`` or ``openvino``.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: of ``read_bundle`` and ``open_graph``.
    """

    def __init__(self, path: str | Path, threads: int = 0, runtime: str = "onnxruntime"):
        self.bundle = read_bundle(path, [FORMAT])
        self.side = int(self.bundle["preprocessing"]["image_size"])
        self.encoder, self.decoder = (
            open_graph(Path(path) / name, runtime, threads) for name in (ENCODER_FILE, DECODER_FILE)
        )
        self.embeddings: np.ndarray | None = None

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As ``zoo.sam.box_forward``: ``image``, ``boxes`` -> mask logits (N, 1, h, w), predicted IoU (N, 1)."""
        (embeddings,) = self.encoder({"image": batch["image"].cpu().numpy()})
        masks, quality = self.decode(embeddings, boxes=batch["boxes"].cpu().numpy())
        return torch.from_numpy(masks), torch.from_numpy(quality)

    def decode(
        self,
        embeddings: np.ndarray,
        points: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        boxes: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Masks of N objects from an embedding, for prompts in pixels of the resized image.

        Args:
            points, labels: (N, P, 2) x, y and (N, P), 1 foreground, 0 background.
            boxes: (N, 4) xyxy.
            mask_input: logits (N, 1, h, w) of an earlier answer.
            multimask_output: three masks of an object and not one.

        Returns: mask logits (N, T, h, w) and predicted IoU (N, T), float32, T 1 or 3.

        Raises:
            ValueError: points without labels, or labels without points.
        """
        size = self.bundle["prompts"]["mask_input_size"]
        masks, quality = self.decoder(prompt_inputs(embeddings, size, points, labels, boxes, mask_input))
        first, end = self.bundle["postprocessing"]["multiple_masks" if multimask_output else "single_mask"]
        return masks[:, first:end], quality[:, first:end]

    def set_image(self, image: np.ndarray) -> None:
        """Run the image encoder on an image (H, W, 3) uint8 RGB; ValueError for another shape or type."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"`image` must be (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}")
        rules = self.bundle["preprocessing"]
        height, width = self.size = image.shape[:2]
        scale = self.side / max(height, width)
        self.shown = int(height * scale + 0.5), int(width * scale + 0.5)
        resized = np.asarray(Image.fromarray(image).resize(self.shown[::-1], Image.Resampling.BILINEAR), np.float32)
        pixels = (resized - np.array(rules["pixel_mean"], np.float32)) / np.array(rules["pixel_std"], np.float32)
        padded = np.zeros((1, 3, self.side, self.side), np.float32)
        padded[0, :, : self.shown[0], : self.shown[1]] = pixels.transpose(2, 0, 1)
        (self.embeddings,) = self.encoder({"image": padded})

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks of one object, arguments and answer as of ``SamPredictor.predict``.

        Args:
            point_coords, point_labels: (P, 2) x, y in pixels of the image and (P,), 1 foreground, 0 background.
            box: (4,) xyxy in pixels of the image.
            mask_input: (1, h, w) logits of an earlier answer.
            return_logits: float32 logits and not bool masks.

        Returns: masks (T, H, W), predicted IoU (T,), logits (T, h, w) for ``mask_input``.

        Raises:
            RuntimeError: no image was set.
            ValueError: a prompt of another shape, or not finite.
        """
        if self.embeddings is None:
            raise RuntimeError("no image is set: call set_image first")
        size = tuple(self.bundle["prompts"]["mask_input_size"])
        point_coords = _numbers("point_coords", point_coords, (None, 2))
        point_labels = _numbers("point_labels", point_labels, (None,))
        box = _numbers("box", box[0] if np.ndim(box) == 2 and len(box) == 1 else box, (4,))
        mask_input = _numbers("mask_input", mask_input, (1, *size))
        ratio = np.array([self.shown[1] / self.size[1], self.shown[0] / self.size[0]])
        logits, quality = self.decode(
            self.embeddings,
            None if point_coords is None else (point_coords * ratio)[None],
            None if point_labels is None else point_labels[None],
            None if box is None else (box.reshape(2, 2) * ratio).reshape(1, 4),
            None if mask_input is None else mask_input[None],
            multimask_output,
        )
        square = resize_bilinear(logits[0], (self.side, self.side))[:, : self.shown[0], : self.shown[1]]
        masks = resize_bilinear(square, self.size)
        threshold = self.bundle["postprocessing"]["mask_threshold"]
        return (masks if return_logits else masks > threshold), quality[0], logits[0]


def _numbers(name: str, value: Any, shape: tuple[int | None, ...]) -> np.ndarray | None:
    """``value`` as an array of ``shape``, in which None is any number."""
    if value is None:
        return None
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        array = np.full((), np.nan)
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    if not fits or not np.isfinite(array).all():
        wanted = ", ".join("N" if want is None else str(want) for want in shape)
        raise ValueError(f"`{name}` must be ({wanted}) finite numbers, got {value!r:.80}")
    return array


def prompt_inputs(
    embeddings: np.ndarray,
    mask_size: Sequence[int],
    points: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    boxes: np.ndarray | None = None,
    mask_input: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """What the decoder's graph takes, by name; arguments as of ``OnnxSam.decode``.

    Args:
        mask_size: (h, w) of the mask input.

    Raises:
        ValueError: points without labels, or labels without points.
    """
    if (points is None) != (labels is None):
        raise ValueError("`points` and `labels` belong together, got one of them: give both or neither")
    given = [prompt for prompt in (points, boxes, mask_input) if prompt is not None]
    count = len(given[0]) if given else 1
    places, kinds = np.zeros((count, 0, 2), np.float32), np.zeros((count, 0), np.float32)
    if points is not None:
        places, kinds = np.asarray(points, np.float32), np.asarray(labels, np.float32)
        if boxes is None:
            places = np.concatenate([places, np.zeros((count, 1, 2), np.float32)], 1)
            kinds = np.concatenate([kinds, np.full((count, 1), -1, np.float32)], 1)
    if boxes is not None:
        places = np.concatenate([places, np.asarray(boxes, np.float32).reshape(-1, 2, 2)], 1)
        kinds = np.concatenate([kinds, np.tile(np.array([2, 3], np.float32), (count, 1))], 1)
    mask = np.zeros((1, 1, *mask_size), np.float32) if mask_input is None else np.asarray(mask_input, np.float32)
    return {
        "image_embeddings": embeddings,
        "point_coords": places,
        "point_labels": kinds,
        "mask_input": mask,
        "has_mask_input": np.array([mask_input is not None], np.float32),
    }
