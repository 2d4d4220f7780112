# SPDX-License-Identifier: Apache-2.0
"""A detector gives boxes, SAM gives one mask a box: together an instance segmentation model for MMDetection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mmdet.models.detectors.base import BaseDetector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ahcq_plugin.graph import UnitError
from ahcq_plugin.mm.data.images import original_image
from ahcq_plugin.mm.data.prompts import BoxPrompts, Detections, ground_truth_prompts
from ahcq_plugin.mm.errors import DataError
from ahcq_plugin.zoo.predict import input_image
from ahcq_plugin.zoo.prompts import Masks, draw_item, input_prompts
from ahcq_plugin.zoo.sam import build_sam, decode_prompts


@MODELS.register_module()
class NoDetector(BaseDetector):
    """Stands where a Runner wants a model when boxes come from the data set or from a file."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.unused = nn.Parameter(torch.zeros(1))  # a Runner of several processes refuses models without parameters

    def loss(self, batch_inputs, batch_data_samples):
        raise NotImplementedError("NoDetector has nothing to train")

    def extract_feat(self, batch_inputs):
        raise NotImplementedError("NoDetector has no features")

    def _forward(self, batch_inputs, batch_data_samples=None):
        raise NotImplementedError("NoDetector has no outputs")

    def predict(self, batch_inputs, batch_data_samples):
        raise ValueError("NoDetector has no boxes: use prompts='gt' or the path of a detections JSON")


@dataclass(frozen=True)
class ImageEmbedding:
    """What the decoder needs of an image.

    Args:
        features: (1, C, h, w).
        original_size, input_size: (height, width) before and after resizing.
    """

    features: Tensor
    original_size: tuple[int, int]
    input_size: tuple[int, int]


@MODELS.register_module()
class BoxPromptedSAM(BaseDetector):
    """One mask per box.

    SAM sees the original image (see :func:`~ahcq_plugin.mm.data.images.original_image`), its longest side resized to
    SAM's input size and zero-padded after normalisation, as ``segment_anything.SamPredictor`` does.

    Args:
        sam: a built SAM, or arguments of :func:`ahcq_plugin.zoo.sam.build_sam` as a dict: ``name`` and ``checkpoint``.
        detector: a built MMDet detector or its config; its data preprocessor becomes this model's.
        prompts: ``'detector'``, ``'gt'`` (boxes of the data set) or the path of detections in COCO results format.
            Default: ``'detector'`` with a detector, else ``'gt'``.
        score_thr: detections (not ground-truth boxes) below this score give no prompt.
        max_boxes: the highest-scoring detections that are kept per image.
        box_chunk: boxes decoded at once; bounds memory, not results.
        cat_ids: category id of each label, for ``prompts`` from a file.
    """

    def __init__(
        self,
        sam: nn.Module | Mapping,
        detector: nn.Module | Mapping | None = None,
        prompts: str | None = None,
        score_thr: float = 0.05,
        max_boxes: int = 100,
        box_chunk: int = 64,
        cat_ids: Sequence[int] | None = None,
    ):
        if isinstance(detector, Mapping):
            detector = MODELS.build(detector)
        preprocessor = dict(type="mmdet.DetDataPreprocessor") if detector is None else detector.data_preprocessor
        super().__init__(data_preprocessor=preprocessor)
        if box_chunk < 1:
            raise ValueError(f"`box_chunk` must be at least 1, got {box_chunk!r}")
        self.detector = detector
        self.sam = build_sam_from_config(sam) if isinstance(sam, Mapping) else sam
        self.prompts = prompts or ("gt" if detector is None else "detector")
        self.score_thr, self.max_boxes, self.box_chunk = score_thr, max_boxes, box_chunk
        self.detections = None
        if self.prompts == "detector":
            if detector is None or isinstance(detector, NoDetector):
                raise ValueError(
                    "prompts='detector' needs a detector; without one use prompts='gt' or a detections JSON"
                )
        elif self.prompts != "gt":
            if cat_ids is None:
                raise ValueError("prompts from a file need `cat_ids`, the category id of each label")
            self.detections = Detections(self.prompts, cat_ids)

    @property
    def device(self) -> torch.device:
        """Where SAM's parameters are."""
        return next(self.sam.parameters()).device

    @torch.no_grad()
    def encode(self, image: np.ndarray) -> ImageEmbedding:
        """Run the image encoder. ``image``: uint8 (H, W, 3) RGB, original pixels."""
        pixels, size = input_image(self.sam, image)
        return ImageEmbedding(self.sam.image_encoder(pixels), image.shape[:2], size)

    def decode(self, embedding: ImageEmbedding, boxes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Masks of ``boxes`` (N, 4), xyxy in pixels of the original image; see :meth:`decode_prompts`."""
        return self.decode_prompts(embedding, {"boxes": boxes})

    @torch.no_grad()
    def decode_prompts(
        self, embedding: ImageEmbedding, prompts: Mapping[str, Tensor], refine: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Masks of prompts of any kind, in chunks.

        Args:
            prompts: of N objects, in pixels of the original image, on the CPU: some of ``boxes``, which are clipped to
                it, ``points`` with ``labels``, ``masks``; see :mod:`ahcq_plugin.zoo.prompts`.
            refine: decode a second time, with the logits of the first as mask inputs beside the same prompts.

        Yields: bool masks (n, H, W) in original pixels and predicted IoU (n,), n <= ``box_chunk``, on SAM's device.
        Raises: UnitError: the mask logits are not finite.
        """
        sam, size = self.sam, embedding.original_size
        if "boxes" in prompts:
            prompts = {**prompts, "boxes": _clipped(prompts["boxes"], size)}
        given = input_prompts(sam, prompts, size)
        count = len(next(iter(given.values())))
        for start in range(0, count, self.box_chunk):
            part = {key: value[start : start + self.box_chunk] for key, value in given.items()}
            logits, iou = decode_prompts(sam, embedding.features, part)
            if refine:
                logits, iou = decode_prompts(sam, embedding.features, {**part, "masks": logits})
            if not bool(torch.isfinite(logits).all()):  # no pixel would be set, and two such masks would be equal
                raise UnitError("mask logits are NaN or infinite: look for damaged weights or an overflow")
            logits = sam.postprocess_masks(logits, embedding.input_size, size)
            yield logits[:, 0] > sam.mask_threshold, iou[:, 0]

    def segment(self, image: np.ndarray, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Masks (N, H, W) bool and predicted IoU (N,) of all ``boxes`` of one image; see :meth:`decode`."""
        chunks = list(self.decode(self.encode(image), boxes)) if len(boxes) else []
        if not chunks:
            nothing = torch.zeros(0, device=self.device)
            return nothing.bool().view(0, 1, 1).expand(0, *image.shape[:2]), nothing
        masks, iou = zip(*chunks, strict=True)
        return torch.cat(masks), torch.cat(iou)

    def calibration_batch(
        self,
        image: np.ndarray,
        boxes: Tensor,
        max_boxes: int = 16,
        generator: torch.Generator | None = None,
        kind: str = "box",
        masks: Masks | None = None,
    ) -> dict[str, Tensor]:
        """Batch for ``ahcq_plugin.quantize``, without the mask inputs of kind ``mask``.

        More than ``max_boxes`` boxes are sampled without replacement, their order kept.

        Args:
            kind, masks: of the prompt and to click on, see :func:`ahcq_plugin.zoo.prompts.prompt_item`.
        Returns: ``image`` (1, 3, S, S) normalised and padded, and a prompt in its pixels: ``boxes`` (n, 4) xyxy, or
            ``points`` (n, P, 2) with ``labels`` (n, P); float32.
        """
        return draw_item(self.sam, image, _clipped(boxes, image.shape[:2]), masks, kind, max_boxes, generator)

    def prompt(self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample]) -> list[BoxPrompts]:
        """Boxes of each data sample in original pixels, from where ``prompts`` says. The detector runs at most once."""
        if self.prompts == "gt":
            return [ground_truth_prompts(sample) for sample in batch_data_samples]
        if self.prompts == "detector":
            samples = self.detector.predict(batch_inputs, batch_data_samples)
            return [self._kept(BoxPrompts.from_instances(sample.pred_instances)) for sample in samples]
        return [self.detected(sample.img_id) for sample in batch_data_samples]

    def detected(self, img_id: int | str) -> BoxPrompts:
        """Boxes of an image from the detections file."""
        return self._kept(self.detections[img_id])

    def _kept(self, prompts: BoxPrompts) -> BoxPrompts:
        return prompts.top(self.score_thr, self.max_boxes)

    def predict(self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample]) -> list[DetDataSample]:
        """Fill ``pred_instances``: bboxes, labels, scores (of the detector), masks, mask_scores.

        ``mask_scores`` = score x predicted IoU; CocoMetric ranks masks by it and boxes by ``scores``.
        """
        for sample, prompts in zip(batch_data_samples, self.prompt(batch_inputs, batch_data_samples), strict=True):
            masks, iou = self.segment(original_image(sample), prompts.boxes)
            sample.pred_instances = InstanceData(
                bboxes=prompts.boxes.to(self.device),
                labels=prompts.labels.to(self.device),
                scores=prompts.scores.to(self.device),
                masks=masks,
                mask_scores=prompts.scores.to(self.device) * iou,
            )
        return batch_data_samples

    def loss(self, batch_inputs, batch_data_samples):
        raise NotImplementedError("BoxPromptedSAM is for inference; train the detector by itself")

    def extract_feat(self, batch_inputs: Tensor):
        raise NotImplementedError("SAM sees the original image: call encode(image)")

    def _forward(self, batch_inputs, batch_data_samples=None):
        raise NotImplementedError("BoxPromptedSAM has mode='predict' only")


def _clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """float32 (N, 4) on the CPU, clipped to the image."""
    return clip_boxes(boxes.detach().to("cpu", torch.float32), size)


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 4) xyxy boxes clipped to an image of ``size`` (height, width): coordinates in [0, width] and [0, height].

    Raises:
        ValueError: not (N, 4); a DataError: not finite.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must have shape (N, 4), got {tuple(boxes.shape)}")
    if not all(map(math.isfinite, boxes.flatten().tolist())):
        raise DataError("boxes must be finite")
    limit = boxes.new_tensor([size[1], size[0], size[1], size[0]])
    return torch.minimum(boxes.clamp(min=0), limit)


def check_sam_config(config: Mapping) -> None:
    """``sam`` of a config has a name, and besides at most a checkpoint; else ValueError."""
    if not isinstance(config, Mapping) or not {"name"} <= set(config) <= {"name", "checkpoint"}:
        got = sorted(config) if isinstance(config, Mapping) else repr(config)
        raise ValueError(f"`sam` takes name and checkpoint, got {got}")


def build_sam_from_config(config: Mapping, build: Callable[..., nn.Module] = build_sam) -> nn.Module:
    """SAM from ``dict(name=..., checkpoint=...)``; see :func:`ahcq_plugin.zoo.sam.build_sam`.

    Args:
        build: takes name (or arguments) and ``checkpoint``.
    Raises:
        ValueError, FileNotFoundError: an unknown key, and what ``build`` raises.
    """
    check_sam_config(config)
    name, checkpoint = config["name"], config.get("checkpoint")
    return build(dict(name) if isinstance(name, Mapping) else name, checkpoint=checkpoint)
