# SPDX-License-Identifier: Apache-2.0
"""The four graphs of a SAM 2 as functions of arrays: numpy, Pillow and a runtime, no PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ahcq_plugin.export.onnx_bundle import (
    DECODER_FILE,
    ENCODER_FILE,
    MEMORY_ATTENTION_FILE,
    MEMORY_ENCODER_FILE,
    SAM2_FORMAT,
    read_bundle,
)
from ahcq_plugin.export.onnx_resize import resize_bilinear
from ahcq_plugin.export.onnx_runtimes import open_graph
from ahcq_plugin.export.onnx_sam2_memory import Remembered, as_bfloat16

CONSTANTS_FILE = "constants.npz"
_NONE = -1  # label of a padding point


class OnnxSam2:
    """A folder that ``export_onnx`` wrote of a SAM 2; ``track``, or ``export.onnx_sam2_video.Video``, follows objects.

    Args:
        path: the folder.
        threads: of the runtime within an operator; 0: as many as it likes.
        runtime: ``onnxruntime`` or ``openvino``.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: of ``read_bundle`` and ``open_graph``.
    """

    def __init__(self, path: str | Path, threads: int = 0, runtime: str = "onnxruntime"):
        self.bundle = read_bundle(path, [SAM2_FORMAT])
        self.side = int(self.bundle["preprocessing"]["image_size"])
        with np.load(Path(path) / CONSTANTS_FILE, allow_pickle=False) as file:
            self.constants = {name: file[name] for name in file.files}
        self.image_encoder, self.memory_attention, self.memory_encoder, self.mask_decoder = (
            open_graph(Path(path) / name, runtime, threads)
            for name in (ENCODER_FILE, MEMORY_ATTENTION_FILE, MEMORY_ENCODER_FILE, DECODER_FILE)
        )

    def track(
        self, frames: Sequence[np.ndarray], masks: np.ndarray, size: tuple[int, int] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Follow the objects of first-frame masks through a clip, as ``zoo.track.track``.

        Args:
            frames: as of ``Video``.
            masks: (N, h, w) bool, one object each, of any size.
            size: of the returned masks; None: that of ``masks``.
        Yields:
            (frame number, (N, height, width) float32 logits): a pixel is the object's where they are > 0.
        """
        from ahcq_plugin.export.onnx_sam2_video import Video  # it has one of us

        video = Video(self, frames, size or masks.shape[-2:])
        for number, mask in enumerate(masks):
            video.prompt(0, number, mask=mask)
        yield from video.propagate()

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """The encoder's input (1, 3, S, S) of an image (H, W, 3) uint8 RGB; float32 (3, S, S) is taken as prepared."""
        if image.dtype == np.float32 and image.shape == (3, self.side, self.side):
            return image[None]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"a frame must be (H, W, 3) uint8 RGB, or (3, {self.side}, {self.side}) float32 as the encoder takes "
                f"it, got {image.shape} {image.dtype}"
            )
        rules = self.bundle["preprocessing"]
        resized = np.asarray(Image.fromarray(image).resize((self.side, self.side)), np.float32)  # bicubic
        mean, std = (np.array(rules[name], np.float32) for name in ("pixel_mean", "pixel_std"))
        pixels = (resized / np.float32(rules["pixel_scale"]) - mean) / std
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])

    def decode(
        self,
        embeddings: np.ndarray,
        features: Sequence[np.ndarray],
        points: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask: bool = False,
    ) -> Remembered:
        """The mask of one object in a frame.

        Args:
            embeddings: (1, C, h, w), conditioned on memories or not.
            features: (1, C/8, 4h, 4w) and (1, C/4, 2h, 2w).
            points, labels: (P, 2) x, y in pixels of the resized frame and (P,): 0, 1, 2 and 3 the corners of a box.
            mask_input: logits (1, 1, 4h, 4w).
            multimask: the best of three masks and not the single one.
        """
        if points is None or labels is None:
            points, labels = np.zeros((1, 2)), np.array([_NONE])
        places = np.concatenate([points, np.zeros((1, 2))])[None].astype(np.float32)
        kinds = np.append(labels, _NONE)[None].astype(np.float32)
        size = self.bundle["prompts"]["mask_input_size"]
        masks, quality, pointers, scores = self.mask_decoder(
            {
                "image_embeddings": embeddings,
                "features_4": features[0],
                "features_8": features[1],
                "point_coords": places,
                "point_labels": kinds,
                "mask_input": np.zeros((1, 1, *size), np.float32) if mask_input is None else mask_input,
                "has_mask_input": np.array([mask_input is not None], np.float32),
            }
        )
        rules, best = self.bundle["multimask"], 1 + int(quality[0, 1:].argmax())
        chosen = best if multimask or self._is_unstable(masks[0, 0]) else 0
        token = best if multimask and rules["pointer_of_chosen"] else 0
        absent, score = self.bundle["postprocessing"]["absent"], float(scores[0, 0])
        logits, seen = masks[:, chosen : chosen + 1], score > absent["score"]
        if not seen:
            logits = np.full_like(logits, absent["logit"])
        return Remembered(logits, self._pointer(pointers[0, token], seen), score)

    def from_mask(self, embeddings: np.ndarray, features: Sequence[np.ndarray], mask: np.ndarray) -> Remembered:
        """What a given mask (S, S) bool stands for in a frame: its own logits, the decoder's pointer."""
        values = mask.astype(np.float32)
        blocks = values.reshape(self.side // 4, 4, self.side // 4, 4)
        wanted = np.einsum("iajb,ab->ij", blocks, self.constants["mask_weight"]) + self.constants["mask_bias"]
        found = self.decode(embeddings, features, mask_input=wanted[None, None].astype(np.float32))
        ends, seen = self.bundle["prompts"]["of_masks"], bool(mask.any())
        full = values * np.float32(ends["inside"] - ends["outside"]) + np.float32(ends["outside"])
        logits = resize_bilinear(full, (self.side // 4, self.side // 4), antialias=True)[None, None]
        score = ends["inside"] if seen else ends["outside"]
        return Remembered(logits, self._pointer(found.pointer, seen), score)

    def remember(self, embeddings: np.ndarray, seen: Remembered, prompted: bool) -> np.ndarray:
        """The memory (h * w, m) of a frame with its mask, in bfloat16's numbers."""
        rules = self.bundle["memory"]
        logits = resize_bilinear(seen.logits, (self.side, self.side))
        if prompted and rules["prompted_masks_are_binary"]:
            shares = (logits > 0).astype(np.float32)
        else:
            with np.errstate(over="ignore"):  # of logits of absent objects
                shares = 1 / (1 + np.exp(-logits))
        mask = shares * np.float32(rules["probability_scale"]) + np.float32(rules["probability_offset"])
        (memory,) = self.memory_encoder({"image_embeddings": embeddings, "mask": mask})
        memory = memory[0].reshape(memory.shape[1], -1).T
        absent = self.constants.get("no_object_memory")
        if absent is not None and seen.score <= self.bundle["postprocessing"]["absent"]["score"]:
            memory = memory + absent
        return as_bfloat16(memory)

    def attend(
        self, embeddings: np.ndarray, memory: np.ndarray, positions: np.ndarray, pointer_tokens: int
    ) -> np.ndarray:
        """Embeddings (1, C, h, w) conditioned on tokens (M, m) with positions (M, m)."""
        (found,) = self.memory_attention(
            {
                "image_embeddings": embeddings,
                "image_positions": self.constants["image_positions"],
                "memory": memory[None],
                "memory_positions": positions[None],
                "pointer_tokens": np.array(pointer_tokens, np.int64),
            }
        )
        return found

    def _pointer(self, pointer: np.ndarray, seen: bool) -> np.ndarray:
        none = self.constants["no_object_pointer"]
        if seen:
            return pointer
        return none if self.bundle["memory"]["absent_pointer_replaces"] else pointer + none

    def _is_unstable(self, logits: np.ndarray) -> bool:
        """Whether the mask changes much with its threshold, where the model asks for that."""
        rule = self.bundle["multimask"]["when_unstable"]
        if rule is None:
            return False
        outer = int((logits > -rule["delta"]).sum())
        return outer > 0 and int((logits > rule["delta"]).sum()) / outer < rule["threshold"]
