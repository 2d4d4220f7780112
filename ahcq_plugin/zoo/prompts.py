# SPDX-License-Identifier: Apache-2.0
"""Prompts as a SAM gets them: boxes, clicks, mask inputs, the grid of everything mode; drawn from annotated objects.

A prompt of N objects is a mapping with some of ``boxes`` (N, 4) xyxy, ``points`` (N, P, 2) x, y with ``labels`` (N, P),
1 for foreground and 0 for background, and ``masks`` (N, 1, 4h, 4w), logits at four times the grid of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.amg import build_point_grid
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor, nn

from ahcq_plugin.zoo.items import Item
from ahcq_plugin.zoo.predict import input_boxes, input_image
from ahcq_plugin.zoo.sam import PROMPTS, decode_prompts

#: What an item can be prompted with: its boxes; one or three clicks an object; one click, and with it the logits that
#: it gives, as ``SamPredictor`` refines a mask; points of everything mode's grid.
KINDS = ("box", "click1", "click3", "mask", "grid")
#: Clicks an object of the kinds that click.
CLICKS = {"click1": 1, "click3": 3, "mask": 1}
#: N masks (H, W) bool.
Masks = Sequence[np.ndarray] | np.ndarray
#: Points on a side of everything mode's grid, by default of segment-anything.
GRID_SIDE = 32


def prompt_forward(sam: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One mask per object for one image and prompts of any kind; with boxes alone, what ``box_forward`` gives.

    Args:
        sam: anything with ``image_encoder``, ``prompt_encoder`` and ``mask_decoder`` called as Sam's are.
        batch: ``image`` (1, 3, S, S) float32, normalised and zero-padded, and a prompt in pixels of that input.

    Returns: mask logits (N, 1, 4h, 4w) and predicted IoU (N, 1).
    Raises: ValueError: no prompt, an unknown key, points without labels.
    """
    given = set(batch) - {"image"}
    if not given or not given <= set(PROMPTS) or ("points" in given) != ("labels" in given):
        raise ValueError(
            f"an item has `image` and some of {', '.join(PROMPTS)}, points with labels; got {sorted(batch)}"
        )
    embedding = sam.image_encoder(batch["image"].to(next(sam.parameters()).device))
    return decode_prompts(sam, embedding, batch)


def check_shares(shares: Mapping[str, Any]) -> dict[str, float]:
    """``shares``: kind -> share of the items, numbers in [0, 1] that add up to 1; those above 0, in the order of KINDS.

    Raises: ValueError: an unknown kind or a bad share.
    """
    unknown = sorted(map(str, set(shares) - set(KINDS)))
    if unknown:
        raise ValueError(f"prompts: unknown kind {', '.join(map(repr, unknown))}; allowed: {', '.join(KINDS)}")
    for kind, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError(f"prompts: the share of {kind!r} must be a number from 0 to 1, got {share!r}")
    if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        raise ValueError(f"prompts: the shares must add up to 1, got {sum(shares.values()):g}")
    return {kind: float(shares[kind]) for kind in KINDS if shares.get(kind)}


def assign_kinds(shares: Mapping[str, Any], count: int, seed: int) -> list[str]:
    """A kind for each of ``count`` items: as many of each as its share says (largest remainders), in an order drawn
    with ``seed``.

    Raises: ValueError: see :func:`check_shares`; a kind with a share gets no item.
    """
    shares = check_shares(shares)
    counts = {kind: math.floor(share * count + 1e-9) for kind, share in shares.items()}
    by_remainder = sorted(shares, key=lambda kind: counts[kind] - shares[kind] * count)
    for kind in by_remainder[: count - sum(counts.values())]:
        counts[kind] += 1
    for kind, items in counts.items():
        if not items:
            raise ValueError(
                f"prompts: a share of {shares[kind]:g} of {count} images gives {kind!r} none; raise it or take more "
                "images"
            )
    kinds = [kind for kind, items in counts.items() for _ in range(items)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [kinds[place] for place in order]


def item_generator(seed: int, index: int) -> torch.Generator:
    """Random numbers of the calibration item at place ``index``."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)


def draw_clicks(
    count: int,
    boxes: Tensor,
    size: tuple[int, int],
    masks: Masks | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``count`` foreground clicks on each object: different pixels of its mask, each as likely; where there is no mask,
    or one without a pixel, points anywhere in its box. Masks with fewer pixels are clicked on the same ones again.

    Args:
        boxes: (N, 4) xyxy in pixels of an image of ``size`` (height, width).
        masks: N masks (H, W) bool.

    Returns: float32 (N, count, 2), x and y in pixels, 0 to width - 1 and height - 1.
    """
    clicks = torch.empty(len(boxes), count, 2)
    for index, box in enumerate(boxes):
        inside = np.flatnonzero(masks[index]) if masks is not None else np.zeros(0, np.int64)
        if len(inside):
            drawn = torch.randperm(len(inside), generator=generator)[:count]
            pixels = torch.from_numpy(inside)[drawn[torch.arange(count) % len(drawn)]]
            clicks[index] = torch.stack([pixels % size[1], pixels // size[1]], 1).float()
        else:
            points = box[:2] + torch.rand(count, 2, generator=generator) * (box[2:] - box[:2])
            clicks[index] = torch.minimum(points.clamp(min=0), points.new_tensor([size[1] - 1, size[0] - 1]))
    return clicks


def foreground(points: Tensor) -> dict[str, Tensor]:
    """The prompt of clicks (N, P, 2) that all lie on the object."""
    return {"points": points, "labels": torch.ones(points.shape[:2], dtype=torch.int32)}


def input_prompts(sam: Sam, prompts: Mapping[str, Tensor], original_size: tuple[int, int]) -> dict[str, Tensor]:
    """Prompts in pixels of an image of ``original_size`` (height, width) as prompts in pixels of SAM's input, on its
    device; masks, which lie on SAM's own grid, stay as they are."""
    given = {key: value.to(sam.device) for key, value in prompts.items()}
    if "boxes" in prompts:
        given["boxes"] = input_boxes(sam, prompts["boxes"], original_size)
    if "points" in prompts:  # in float64, as SamPredictor does
        scaled = ResizeLongestSide(sam.image_encoder.img_size).apply_coords(prompts["points"].numpy(), original_size)
        given["points"] = torch.from_numpy(scaled).to(sam.device, torch.float32)
    return given


def draw_item(
    sam: Sam,
    image: np.ndarray,
    boxes: Tensor,
    masks: Masks | None,
    kind: str,
    most: int,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """An item for :func:`prompt_forward` but for the mask inputs of kind ``mask``, which :func:`with_masks` adds.

    Args: as of :func:`prompt_item`.
    """
    size = image.shape[:2]
    if len(boxes) > most:  # without replacement, their order kept
        chosen = torch.randperm(len(boxes), generator=generator)[:most].sort().values
        boxes, masks = boxes[chosen], None if masks is None else [masks[index] for index in chosen.tolist()]
    if kind == "box":
        prompts = {"boxes": boxes}
    elif kind == "grid":
        points = torch.from_numpy(build_point_grid(GRID_SIDE)).float() * torch.tensor([size[1], size[0]])
        chosen = torch.randperm(len(points), generator=generator)[:most].sort().values
        prompts = foreground(points[chosen, None])
    else:
        prompts = foreground(draw_clicks(CLICKS[kind], boxes, size, masks, generator))
    return {"image": input_image(sam, image)[0], **input_prompts(sam, prompts, size)}


@torch.no_grad()
def with_masks(sam: Sam, item: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``item`` with the logits that it gives as its mask inputs."""
    return {**item, "masks": prompt_forward(sam, item)[0].float()}


def prompt_item(
    sam: Sam,
    image: np.ndarray,
    boxes: Tensor,
    masks: Masks | None = None,
    kind: str = "box",
    most: int = 16,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """A calibration item, for :func:`prompt_forward`.

    Args:
        sam: in floating point; it gives the mask inputs.
        image: (H, W, 3) uint8 RGB.
        boxes: (N, 4) float32 xyxy in pixels of the image.
        masks: N masks (H, W) bool to click on; None: clicks lie in the boxes.
        kind: one of :data:`KINDS`.
        most: objects, or points of the grid, that are drawn.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of prompt {kind!r}; allowed: {', '.join(KINDS)}")
    item = draw_item(sam, image, boxes, masks, kind, most, generator)
    return with_masks(sam, item) if kind == "mask" else item


def mixed_items(
    sam: Sam, images: Sequence[Item], shares: Mapping[str, float], most: int = 16, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Calibration items with the kinds of prompts mixed, one kind an image: ``quantize(sam, mixed_items(...),
    forward=prompt_forward)``.

    Args:
        shares: kind -> share of the images; they add up to 1.
        most, sam: see :func:`prompt_item`.
        seed: kinds and prompts depend on it and the image's place.
    """
    kinds = assign_kinds(shares, len(images), seed)
    return [
        prompt_item(sam, item.image, torch.from_numpy(item.boxes), item.masks, kind, most, item_generator(seed, index))
        for index, (item, kind) in enumerate(zip(images, kinds, strict=True))
    ]
