# SPDX-License-Identifier: Apache-2.0
"""Losses: the mask of each box, and a dense task that makes the encoder look at the image.

With the mask loss alone a small model trained from nothing learns to fill the box: a filled box is a good answer
that needs no image, and the gradient that reaches the encoder is weak. The dense head therefore asks the embedding of
each pixel whether its neighbours belong to the same object, whether it belongs to an object at all, and how far the
sides of that object's visible box are: what a decoder must know to compare a pixel with a prompted box.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor, nn

from ahcq_plugin.studies.training.decoding import decode_tokens, split_pixels

OFFSETS = (1, 4, 12)  # pixels of the half-size map
OUTSIDE_TOKENS = 32  # tokens a box away from it that are asked as well, on average


class DenseHead(nn.Module):
    """Thrown away after training. From the embedding (B, C, G, G), G the grid of patches of 8 pixels:
    affinities to the right and below for each offset and objectness, (B, 7, 4G, 4G), and the logarithms of the
    distances to the sides of the box, (B, 4, 2G, 2G)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.affinity = nn.Sequential(
            nn.Conv2d(channels, 256, 1), nn.GELU(), nn.Conv2d(256, (2 * len(OFFSETS) + 1) * 16, 1)
        )
        self.extent = nn.Sequential(nn.Conv2d(channels, 128, 1), nn.GELU(), nn.Conv2d(128, 16, 1))

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        return F.pixel_shuffle(self.affinity(embedding), 4), F.pixel_shuffle(self.extent(embedding), 2)


def balanced_bce(logits: Tensor, positive: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy over the valid pixels, positives and negatives weighing the same. All of one shape."""
    loss = F.softplus(torch.where(positive, -logits, logits))
    yes, no = (valid & positive).float(), (valid & ~positive).float()
    return (loss * yes).sum() / (2 * yes.sum() + 1) + (loss * no).sum() / (2 * no.sum() + 1)


def dense_loss(head: DenseHead, embedding: Tensor, labels: Tensor, extents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Affinity, objectness and extent losses.

    Args: embedding (B, C, G, G); labels (B, 4G, 4G) int and extents (B, 4, 2G, 2G) as made by ``make_sample``.
    Returns: their weighted sum and the terms, detached.
    """
    logits, sides = (out.float() for out in head(embedding))
    known = labels != -1
    terms = []
    for k, d in enumerate(OFFSETS):
        for axis, channel in ((2, 2 * k), (1, 2 * k + 1)):
            length = labels.shape[axis] - d
            a, b = labels.narrow(axis, 0, length), labels.narrow(axis, d, length)
            valid = known.narrow(axis, 0, length) & known.narrow(axis, d, length) & ~((a == -2) & (b == -2))
            terms.append(balanced_bce(logits[:, channel].narrow(axis, 0, length), a == b, valid))
    affinity = torch.stack(terms).mean()
    objects = balanced_bce(logits[:, -1], labels > 0, known)
    inside = (extents[:, :1] >= 0).float()
    # two pixels are added before the logarithm: errors far below a pixel do not matter
    error = F.smooth_l1_loss(sides, ((extents.clamp(min=0) + 2) / 32).log(), reduction="none", beta=0.1)
    extent = (error * inside).sum() / (4 * inside.sum() + 1)
    return affinity + 0.5 * objects + extent, {
        "affinity": affinity.detach(),
        "object": objects.detach(),
        "extent": extent.detach(),
    }


def mask_loss(
    sam: Sam, embedding: Tensor, boxes: Tensor, targets: Tensor, plain_share: float = 0.5
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the single mask of each box, judged in the box with a margin, at the pixels of the mask logits.

    Per box: cross-entropy, plain and with equal weight for both classes, and Dice inside; cross-entropy at random
    tokens outside; squared error of the predicted IoU.
    Args: embedding (B, C, G, G); boxes (B, n, 4) float32; targets (B, n, 4G, 4G) uint8, covered share x 255;
        plain_share: of the plain cross-entropy. With any of it a decoder that knows nothing answers "no object
        anywhere" and stays there for long; start with 0.
    Returns: mean over boxes, and the terms, detached; ``iou`` is the mean IoU inside the margin.
    """
    images, per_image = boxes.shape[:2]
    grid = embedding.shape[-1]
    owner = torch.arange(images, device=boxes.device).repeat_interleave(per_image)
    boxes, targets = boxes.flatten(0, 1), targets.flatten(0, 1)
    region = split_pixels(_region(boxes, grid, sam.image_encoder.img_size), grid)
    chosen = region.flatten(2).any(2)
    chosen = chosen | (torch.rand(chosen.shape, device=boxes.device) < OUTSIDE_TOKENS / grid**2)
    logits, predicted = decode_tokens(sam, embedding, owner, boxes, chosen)
    logits, predicted = logits.float().flatten(1), predicted.float()
    box = chosen.nonzero(as_tuple=True)[0]
    inside = region[chosen].flatten(1).float()
    target = split_pixels(targets, grid)[chosen].flatten(1).float() / 255
    probability = logits.sigmoid()

    def total(values: Tensor) -> Tensor:  # per box
        return values.new_zeros(len(boxes)).index_add_(0, box, values.sum(1))

    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    yes, no, out = inside * target, inside * (1 - target), 1 - inside
    plain = total(entropy * inside) / total(inside)
    balanced = total(entropy * yes) / (2 * total(yes) + 1) + total(entropy * no) / (2 * total(no) + 1)
    outside = total(entropy * out) / (total(out) + 1)
    dice = 1 - (2 * total(probability * yes) + 0.5) / (total(probability * inside) + total(yes) + 0.5)
    with torch.no_grad():
        hard, truth = (logits > 0) * inside, (target > 0.5) * inside
        iou = total(hard * truth) / total(((hard + truth) > 0).float()).clamp(min=1)
    quality = (predicted - iou) ** 2
    mask = plain_share * plain + (1 - plain_share) * balanced + dice
    loss = (mask + (0.1 + 0.8 * plain_share) * outside + 0.2 * quality).mean()
    return loss, {"mask": mask.detach().mean(), "iou": iou.mean(), "outside": outside.detach().mean()}


def _region(boxes: Tensor, grid: int, size: int) -> Tensor:
    """(N, 4G, 4G) bool: pixels of the mask whose centre lies in the box enlarged by a quarter and 6 pixels."""
    centre = (torch.arange(4 * grid, device=boxes.device) + 0.5) * (size / (4 * grid))
    margin = 0.125 * (boxes[:, 2:] - boxes[:, :2]) + 6
    low, high = boxes[:, :2] - margin, boxes[:, 2:] + margin
    inside = (centre > low[..., None]) & (centre < high[..., None])  # (N, 2, 4G): x, y
    return inside[:, 1, :, None] & inside[:, 0, None, :]
