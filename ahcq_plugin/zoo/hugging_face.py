# SPDX-License-Identifier: Apache-2.0
"""SAM of Hugging Face ``transformers``, presented as the ``Sam`` that the rest of this package runs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

#: What a name starts with.
PREFIX = "hf:"
_INSTALL = "pip install 'ahcq_plugin[hf]'"


def build_hugging_face(source: str, random: bool = False) -> nn.Module:
    """A SAM of ``transformers`` behind the interface of ``segment_anything``.

    Args:
        source: folder with ``config.json`` and ``model.safetensors``, or the model's name on the hub, of which the
            local cache is used where there is no network.
        random: random weights; of ``source`` only the config is read.
    Raises:
        FileNotFoundError: no such folder, and the hub has no such model or cannot be reached.
        ValueError: ``transformers`` is not installed, or the model is no SAM.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(f"'{PREFIX}{source}' needs the package transformers ({error}): {_INSTALL}") from error
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(_not_found(source, error)) from error
    if config.model_type != "sam":
        raise ValueError(
            f"'{PREFIX}{source}' is a {config.model_type!r}, only 'sam' has SAM's box prompts: quantize it from Python "
            "with ahcq_plugin.quantize"
        )
    if random:
        return HuggingFaceSam(transformers.SamModel(config))
    try:  # safetensors hold no code
        model = transformers.SamModel.from_pretrained(source, config=config, use_safetensors=True)
    except OSError as error:
        raise FileNotFoundError(_not_found(source, error)) from error
    return HuggingFaceSam(model)


def _not_found(source: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    what = "a folder" if Path(source).is_dir() else "no folder, and was not found on the hub or in its local cache"
    return (
        f"cannot load '{PREFIX}{source}': {source} is {what} ({reason}); without a network, copy config.json and "
        f"model.safetensors of the model into a folder and name that: {PREFIX}/path/to/folder"
    )


class HuggingFaceSam(nn.Module):
    """``transformers.SamModel`` as ``segment_anything.modeling.Sam``.

    Its parts are called as Sam's are, and ``state_dict`` has the names of ``model`` behind ``model.``.

    Args:
        model: a ``SamModel``.
    """

    mask_threshold, image_format = Sam.mask_threshold, Sam.image_format
    device, preprocess, postprocess_masks = Sam.device, Sam.preprocess, Sam.postprocess_masks

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        # as its image processor normalises, in [0, 255]
        for name, value in (("pixel_mean", (0.485, 0.456, 0.406)), ("pixel_std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, 255 * torch.tensor(value).view(-1, 1, 1), persistent=False)

    @property
    def image_encoder(self) -> ImageEncoder:
        """Pixels (1, 3, S, S) -> embedding (1, C, h, w)."""
        return ImageEncoder(self.model)

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """``points`` (N, P, 2) with labels (N, P), ``boxes`` (N, 4), ``masks`` (N, 1, 4h, 4w) -> sparse (N, T, C) and
        dense (N, C, h, w) embeddings."""
        return PromptEncoder(self.model)

    @property
    def mask_decoder(self) -> MaskDecoder:
        """Embeddings of one image and N prompts -> mask logits (N, M, 4h, 4w) and predicted IoU (N, M)."""
        return MaskDecoder(self.model)


class _Part(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


class ImageEncoder(_Part):
    """See :attr:`HuggingFaceSam.image_encoder`."""

    @property
    def img_size(self) -> int:
        """S, the side of the input in pixels."""
        return self.model.config.vision_config.image_size

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.vision_encoder(pixels)[0]


class PromptEncoder(_Part):
    """See :attr:`HuggingFaceSam.prompt_encoder`. Each prompt is an image of the batch with one object."""

    def get_dense_pe(self) -> Tensor:
        """Position encoding (1, C, h, w) of the embedding's grid."""
        return self.model.get_image_wide_positional_embeddings()

    def forward(
        self, points: Sequence[Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        clicks, labels = (None, None) if points is None else (part[:, None] for part in points)
        # cloned: some versions move them to the centres of pixels in place
        corners = None if boxes is None else boxes[:, None].clone()
        sparse, dense = self.model.prompt_encoder(
            input_points=clicks, input_labels=labels, input_boxes=corners, input_masks=masks
        )
        return (None if sparse is None else sparse[:, 0]), dense


class MaskDecoder(_Part):
    """See :attr:`HuggingFaceSam.mask_decoder`."""

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor | None,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        sparse, dense = sparse_prompt_embeddings, dense_prompt_embeddings
        count = len(dense) if sparse is None else len(sparse)
        out: Any = self.model.mask_decoder(
            image_embeddings=image_embeddings.expand(count, -1, -1, -1),
            image_positional_embeddings=image_pe.expand(count, -1, -1, -1),
            sparse_prompt_embeddings=None if sparse is None else sparse[:, None],
            dense_prompt_embeddings=dense.expand(count, -1, -1, -1),
            multimask_output=multimask_output,
        )
        return out[0][:, 0], out[1][:, 0]
