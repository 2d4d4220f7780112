# SPDX-License-Identifier: Apache-2.0
"""What of a SAM becomes a graph: its image encoder, and its prompt encoder and mask decoder as one."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ahcq_plugin.export.onnx_bundle import DECODER_FILE, ENCODER_FILE


@dataclass(frozen=True)
class Part:
    """One graph.

    Attributes:
        file: its name in the folder.
        module, args: what is exported, and positional arguments of the sizes that it keeps.
        inputs, outputs: names, in order.
        dynamic: input or output -> axis -> name, of sizes that may change.
    """

    file: str
    module: nn.Module
    args: tuple[Tensor, ...]
    inputs: list[str]
    outputs: list[str]
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)


class PromptDecoder(nn.Module):
    """Prompt encoder and mask decoder of a SAM with the inputs of SAM's own ONNX decoder, so that one graph serves all
    prompts: labels choose the embedding of a point, and a mask is weighted by ``has_mask_input``."""

    def __init__(self, prompt_encoder: nn.Module, mask_decoder: nn.Module):
        super().__init__()
        self.prompt_encoder, self.mask_decoder = prompt_encoder, mask_decoder

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Shapes as ``export_onnx`` says; the masks of all tokens, (N, tokens, h, w), and their predicted IoU."""
        return self.mask_decoder.predict_masks(
            image_embeddings=image_embeddings,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=self.points(point_coords, point_labels),
            dense_prompt_embeddings=self.mask(mask_input, has_mask_input),
        )

    def points(self, coords: Tensor, labels: Tensor) -> Tensor:
        """Embeddings (N, P, C) of points (N, P, 2) with labels (N, P)."""
        encoder, labels = self.prompt_encoder, labels[..., None]
        # of a pixel the centre
        found = encoder.pe_layer.forward_with_coords(coords + 0.5, encoder.input_image_size)
        found = torch.where(labels == -1, encoder.not_a_point_embed.weight, found)
        for label, embedding in enumerate(encoder.point_embeddings):
            found = torch.where(labels == label, found + embedding.weight, found)
        return found

    def mask(self, mask: Tensor, given: Tensor) -> Tensor:
        """Embedding (1 or N, C, h, w) of mask logits, that of no mask where ``given`` is 0."""
        encoder = self.prompt_encoder
        none = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        return torch.where(given.reshape(-1, 1, 1, 1) > 0, encoder.mask_downscaling(mask), none)


def prompt_inputs(prompt_encoder: nn.Module, device: torch.device) -> tuple[Tensor, ...]:
    """Points, labels, mask and its weight of two objects, as ``PromptDecoder`` takes them."""
    side = prompt_encoder.input_image_size[0]
    points = torch.tensor([[[0.0, 0.0], [side / 2, side / 2]]] * 2, device=device)
    labels = torch.tensor([[2.0, 3.0]] * 2, device=device)
    mask = torch.zeros(1, 1, *prompt_encoder.mask_input_size, device=device)
    return points, labels, mask, torch.zeros(1, device=device)


def decoder_part(file: str, decoder: PromptDecoder, features: tuple[Tensor, ...], outputs: list[str]) -> Part:
    """The graph of a decoder, for any number of objects and points."""
    inputs = list(inspect.signature(type(decoder).forward).parameters)[1:]
    sizes = {name: {0: "prompts", 1: "points"} for name in ("point_coords", "point_labels")}
    sizes |= {name: {0: "prompts"} for name in outputs} | {"mask_input": {0: "mask_inputs"}}
    prompts = prompt_inputs(decoder.prompt_encoder, features[0].device)
    return Part(file, decoder, (*features, *prompts), inputs, outputs, sizes)


def sam_parts(sam: nn.Module) -> list[Part]:
    """The two graphs of a SAM whose quantizers ONNX can express."""
    side, device = sam.image_encoder.img_size, next(sam.parameters()).device
    image = torch.zeros(1, 3, side, side, device=device)
    decoder = PromptDecoder(sam.prompt_encoder, sam.mask_decoder)
    embeddings = sam.image_encoder(image)
    return [
        Part(ENCODER_FILE, sam.image_encoder, (image,), ["image"], ["image_embeddings"]),
        decoder_part(DECODER_FILE, decoder, (embeddings,), ["masks", "iou_predictions"]),
    ]
