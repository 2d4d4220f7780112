# SPDX-License-Identifier: Apache-2.0
"""SAM 2 over the frames of several clips at once, with gradients, and the losses of what it predicts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor

SURE = 10.0  # logit of a given truth


@dataclass
class Prompts:
    """What the first frame is told about N objects: masks (N, 1, S, S) bool, or boxes (N, 4) xyxy in pixels."""

    masks: Tensor | None = None
    boxes: Tensor | None = None


@dataclass
class Predictions:
    """Per frame: mask logits (N, h, w), predicted IoU (N,) and object score (N,), before any of them is forced."""

    logits: list[Tensor] = field(default_factory=list)
    quality: list[Tensor] = field(default_factory=list)
    score: list[Tensor] = field(default_factory=list)


def image_levels(model: SAM2Base, pixels: Tensor) -> tuple[dict, list[Tensor]]:
    """``forward_image`` of normalised frames (n, 3, S, S), and the three levels as they are before the projections
    of the mask decoder: strides 4, 8 and 16."""
    out = model.image_encoder(pixels)
    levels = list(out["backbone_fpn"])
    out["backbone_fpn"][0] = model.sam_mask_decoder.conv_s0(levels[0])
    out["backbone_fpn"][1] = model.sam_mask_decoder.conv_s1(levels[1])
    return out, levels


def track(
    model: SAM2Base,
    features: dict,
    frames: int,
    owner: Tensor,
    prompts: Prompts,
    gap: int = 0,
    truth: Tensor | None = None,
    forced: Tensor | None = None,
) -> Predictions:
    """Follow N objects from the first frame of their clips to the last.

    Args:
        features: of ``image_levels`` for all frames of all clips, clip by clip. owner: (N,) clip of each object.
        gap: frames that lie between the first frame and the second without being seen.
        truth: masks (N, T, S, S) bool, for training. The memory learns from the truth whether an object is there.
        forced: (N,) bool, objects whose true masks go to the memory in place of the predicted ones.

    Returns: predictions for every frame (of the first one: how the decoder reads the prompt).
    """
    _, vision, positions, sizes = model._prepare_backbone_features(features)
    predictions, output = Predictions(), {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    current = 0

    def keep(_module, _args, result):
        logits, quality, tokens, score = result
        predictions.logits.append(logits[:, 0])
        predictions.quality.append(quality[:, 0])
        predictions.score.append(score[:, 0])
        if truth is None:
            return None
        score = torch.where(truth[:, current].flatten(1).any(1)[:, None], SURE, -SURE)
        if forced is not None and forced.any():
            low = F.interpolate(truth[:, current, None].float(), size=logits.shape[-2:], mode="area")
            logits = torch.where(forced[:, None, None, None], (2 * low - 1) * SURE, logits.float())
        return logits, quality, tokens, score

    hook = model.sam_mask_decoder.register_forward_hook(keep)
    try:
        for current in range(frames):
            first = current == 0
            index = current if first else current + gap
            points = None
            if first and prompts.boxes is not None:
                labels = torch.tensor([[2, 3]], dtype=torch.int32, device=owner.device).expand(len(owner), 2)
                points = {"point_coords": prompts.boxes.view(-1, 2, 2), "point_labels": labels}
            at = owner * frames + current
            result = model.track_step(
                frame_idx=index,
                is_init_cond_frame=first,
                current_vision_feats=[x[:, at] for x in vision],
                current_vision_pos_embeds=[x[:, at] for x in positions],
                feat_sizes=sizes,
                point_inputs=points,
                mask_inputs=prompts.masks.float() if first and prompts.masks is not None else None,
                output_dict=output,
                num_frames=frames + gap,
            )
            output["cond_frame_outputs" if first else "non_cond_frame_outputs"][index] = result
    finally:
        hook.remove()
    return predictions


def tracking_loss(
    predictions: Predictions, targets: Tensor, plain_weight: float, first_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of all objects in all frames, the first one weighing ``first_weight``.

    Masks are compared at half the size of the frames. Where an object is visible: cross-entropy with equal weight for
    both classes, plain cross-entropy times ``plain_weight``, Dice, squared error of the predicted IoU; everywhere:
    cross-entropy of the object score.
    Args: targets (N, T, S, S) bool.
    Returns: the loss, and terms, detached; ``iou`` is the mean IoU of visible objects after the first frame.
    """
    size = targets.shape[-1] // 2
    target = F.avg_pool2d(targets.float(), 2).flatten(2)
    logits = torch.stack(predictions.logits, 1).float()
    logits = F.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False).flatten(2)
    quality, score = (torch.stack(x, 1).float() for x in (predictions.quality, predictions.score))
    seen = targets.flatten(2).any(2).float()
    weight = torch.ones_like(seen)
    weight[:, 0] = first_weight
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    area = target.sum(2)
    balanced = (entropy * target).sum(2) / (2 * area + 1) + (entropy * (1 - target)).sum(2) / (2 * (size**2 - area) + 1)
    probability = logits.sigmoid()
    dice = 1 - (2 * (probability * target).sum(2) + 0.5) / (probability.sum(2) + area + 0.5)
    with torch.no_grad():
        hard, truth = logits > 0, target >= 0.5
        iou = (hard & truth).sum(2) / (hard | truth).sum(2).clamp(min=1)
    mask = balanced + plain_weight * entropy.mean(2) + dice
    there = F.binary_cross_entropy_with_logits(score, seen, reduction="none")
    loss = (weight * (seen * (mask + 0.2 * (quality - iou) ** 2) + 0.2 * there)).sum() / weight.sum()
    later = seen[:, 1:]
    terms = {
        "mask": (mask * seen)[:, 1:].sum().detach() / later.sum().clamp(min=1),
        "iou": (iou * seen)[:, 1:].sum() / later.sum().clamp(min=1),
        "first": iou[:, 0].mean(),
        "there": there.detach().mean(),
    }
    return loss, terms
