# SPDX-License-Identifier: Apache-2.0
"""What of a SAM 2 becomes a graph: image encoder, memory attention, memory encoder, and prompts to masks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ahcq_plugin.export.onnx_bundle import (
    DECODER_FILE,
    ENCODER_FILE,
    MEMORY_ATTENTION_FILE,
    MEMORY_ENCODER_FILE,
)
from ahcq_plugin.export.onnx_complex import turn_by_real_numbers
from ahcq_plugin.export.onnx_parts import Part, PromptDecoder, decoder_part
from ahcq_plugin.graph.untraceable import rotate

#: What the driver does not know otherwise; all published SAM 2s are so.
_REQUIRED = {
    "use_high_res_features_in_sam": True,
    "use_obj_ptrs_in_encoder": True,
    "use_mask_input_as_output_without_sam": True,
    "directly_add_no_mem_embed": True,
    "pred_obj_scores": True,
    "soft_no_obj_ptr": False,
    "fill_hole_area": 0,
    "non_overlap_masks": False,
    "non_overlap_masks_for_mem_enc": False,
    "clear_non_cond_mem_around_input": False,
}


def is_sam2(model: nn.Module) -> bool:
    """Whether a model has SAM 2's parts."""
    return all(hasattr(model, part) for part in ("memory_attention", "memory_encoder", "sam_mask_decoder"))


def check_sam2(model: nn.Module) -> None:
    """ValueError for a SAM 2 with options that the driver does not follow."""
    wrong = [f"{name}={getattr(model, name)!r}" for name, value in _REQUIRED.items() if getattr(model, name) != value]
    if wrong:
        raise ValueError(
            f"the driver of the graphs follows SAM 2s with {_REQUIRED}, got {', '.join(wrong)}: build it without "
            "post-processing"
        )
    if model.num_maskmem < 1:
        raise ValueError(f"`num_maskmem` must be at least 1, got {model.num_maskmem}: there is no memory to attend to")


class SineCosineRotation(nn.Module):
    """``graph.untraceable.rotate`` without complex numbers, and with a number of keys that may change.

    The table is made in the first call, which must not be the exporter's; keys without a position are turned by 0.
    """

    cosines: Tensor
    sines: Tensor

    def __init__(self, theta: float, repeat: bool):
        super().__init__()
        self.theta, self.repeat, self.ready = theta, repeat, False

    def forward(self, q: Tensor, k: Tensor, unrotated: int | Tensor) -> tuple[Tensor, Tensor]:
        """Shapes, dtypes and meaning of ``rotate``."""
        if not self.ready:
            self._make_table(q)
        cosines, sines = self.cosines, self.sines
        if self.repeat:
            place = torch.arange(k.shape[-2], device=k.device)
            turned = (place < k.shape[-2] - unrotated)[:, None]
            place = place % len(cosines)
            cosines, sines = torch.where(turned, cosines[place], 1.0), torch.where(turned, sines[place], 0.0)
        return _turn(q, self.cosines, self.sines), _turn(k, cosines, sines)

    def _make_table(self, q: Tensor) -> None:
        ones = torch.zeros(q.shape[-2:], device=q.device)
        ones[:, 0::2] = 1  # 1 + 0i, turned, is the rotation itself
        table, _ = rotate(ones, ones, 0, self.theta, False)
        self.register_buffer("cosines", table[:, 0::2].contiguous())
        self.register_buffer("sines", table[:, 1::2].contiguous())
        self.ready = True


def _turn(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cosines - odd * sines, even * sines + odd * cosines), -1).flatten(-2)


def _attend(
    attention: nn.Module, rotation: nn.Module, q: Tensor, k: Tensor, v: Tensor, num_k_exclude_rope: int | Tensor = 0
) -> Tensor:
    """SAM 2's ``RoPEAttention.forward`` with another rotation."""
    pairs = ((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v))
    q, k, v = (attention._separate_heads(project(x), attention.num_heads) for project, x in pairs)
    q, k = rotation(q, k, num_k_exclude_rope)
    return attention.out_proj(attention._recombine_heads(F.scaled_dot_product_attention(q, k, v)))


def without_complex_numbers(model: nn.Module) -> None:
    """Rotations of traced layers, and of layers as they were, by sines and cosines, in place; their tables are made in
    the next call."""
    for module in list(model.modules()):
        if type(module).__name__ == "RoPEAttention":
            rotation = SineCosineRotation(float(module.compute_cis.keywords["theta"]), bool(module.rope_k_repeat))
            module.forward = partial(_attend, module, rotation)
        elif isinstance(module, fx.GraphModule):
            for node in [n for n in module.graph.nodes if n.target is rotate]:
                name = f"{node.name}_by_sines"
                module.add_submodule(name, SineCosineRotation(**node.kwargs))
                with module.graph.inserting_before(node):
                    node.replace_all_uses_with(module.graph.call_module(name, node.args))
                module.graph.erase_node(node)
            turn_by_real_numbers(module)


class _ImageEncoder(nn.Module):
    """An image to the embeddings and the two features of higher resolution that the decoder takes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1, 3, S, S) -> (1, C, S/16, S/16), (1, C/8, S/4, S/4), (1, C/4, S/8, S/8)."""
        fine, middle, embeddings = self.model.forward_image(image)["backbone_fpn"][-3:]
        return embeddings, fine, middle


class _MemoryAttention(nn.Module):
    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(
        self,
        image_embeddings: Tensor,
        image_positions: Tensor,
        memory: Tensor,
        memory_positions: Tensor,
        pointer_tokens: Tensor,
    ) -> Tensor:
        """(1, C, h, w) twice, (1, M, m) twice, (): of the M, those at the end without a position -> (1, C, h, w)."""
        current, positions = (x.flatten(2).permute(2, 0, 1) for x in (image_embeddings, image_positions))
        out = self.attention(
            curr=current,
            curr_pos=positions,
            memory=memory.transpose(0, 1),
            memory_pos=memory_positions.transpose(0, 1),
            num_obj_ptr_tokens=pointer_tokens,
        )
        return out.permute(1, 2, 0).reshape(image_embeddings.shape)


class _MemoryEncoder(nn.Module):
    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, image_embeddings: Tensor, mask: Tensor) -> Tensor:
        """(1, C, h, w) and the mask (1, 1, S, S), scaled probabilities -> memory (1, m, h, w)."""
        return self.encoder(image_embeddings, mask, skip_mask_sigmoid=True)["vision_features"]


class _MaskDecoder(PromptDecoder):
    """As a SAM's, with features of higher resolution, pointers of all tokens and a score of the object."""

    def __init__(self, model: nn.Module):
        super().__init__(model.sam_prompt_encoder, model.sam_mask_decoder)
        self.point_to = model.obj_ptr_proj

    def forward(
        self,
        image_embeddings: Tensor,
        features_4: Tensor,
        features_8: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of N objects masks (N, T, h, w), predicted IoU (N, T), pointers (N, T, C), object scores (N, 1)."""
        masks, quality, tokens, score = self.mask_decoder.predict_masks(
            image_embeddings=image_embeddings,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=self.points(point_coords, point_labels),
            dense_prompt_embeddings=self.mask(mask_input, has_mask_input),
            repeat_image=True,
            high_res_features=[features_4, features_8],
        )
        return masks, quality, self.point_to(tokens), score


def sam2_parts(model: Any) -> list[Part]:
    """The four graphs of a SAM 2 whose quantizers ONNX can express; changes its rotations and positions in place."""
    without_complex_numbers(model)
    device, side = next(model.parameters()).device, model.image_size
    image = torch.zeros(1, 3, side, side, device=device)
    trunk = model.image_encoder.trunk
    position = trunk._get_pos_embed(trunk.patch_embed(image).shape[1:3])
    trunk._get_pos_embed = lambda size: position  # else resized in every run
    encoder = _ImageEncoder(model)
    embeddings, fine, middle = encoder(image)
    mask = torch.zeros(1, 1, side, side, device=device)
    remember = _MemoryEncoder(model.memory_encoder)
    memory = remember(embeddings, mask).flatten(2).transpose(1, 2)
    pointers = torch.zeros(1, model.hidden_dim // model.mem_dim, model.mem_dim, device=device)
    tokens = torch.cat([memory, memory, pointers], 1)
    attention = _MemoryAttention(model.memory_attention)
    attended = (embeddings, torch.zeros_like(embeddings), tokens, torch.zeros_like(tokens))
    attended += (torch.tensor(pointers.shape[1], device=device),)
    attention(*attended)  # makes the tables of the rotations
    inputs = ["image_embeddings", "image_positions", "memory", "memory_positions", "pointer_tokens"]
    outputs = ["masks", "iou_predictions", "object_pointers", "object_scores"]
    return [
        Part(ENCODER_FILE, encoder, (image,), ["image"], ["image_embeddings", "features_4", "features_8"]),
        Part(
            MEMORY_ATTENTION_FILE,
            attention,
            attended,
            inputs,
            ["conditioned_embeddings"],
            dict.fromkeys(("memory", "memory_positions"), {1: "tokens"}),
        ),
        Part(MEMORY_ENCODER_FILE, remember, (embeddings, mask), ["image_embeddings", "mask"], ["memory"]),
        decoder_part(DECODER_FILE, _MaskDecoder(model), (embeddings, fine, middle), outputs),
    ]
