# SPDX-License-Identifier: Apache-2.0
"""The SAMs of Hugging Face ``transformers``: their own classes with small configs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.families.case import ITEMS, Case, Family, boxes, image, points

DIM = 64
DECODER = {
    "hidden_size": DIM,
    "mlp_dim": 64,
    "num_attention_heads": 2,
    "iou_head_hidden_dim": 32,
    "iou_head_depth": 2,
}


def _prompts(side: int) -> list[dict[str, Tensor]]:
    """Boxes on one image, clicks on the next."""
    clicks, labels = points(side)
    prompts = [{"input_boxes": boxes(side)[None]}, {"input_points": clicks[None], "input_labels": labels[None]}]
    return [{"pixel_values": image(side, seed=seed), **prompts[seed % 2]} for seed in range(ITEMS)]


def masks(model: nn.Module, item: dict[str, Tensor]) -> list[Tensor]:
    """Masks and predicted IoU of one image. Some versions move the given boxes to the centres of pixels in place."""
    out = model(**{key: value.clone() for key, value in item.items()}, multimask_output=False)
    return [out.pred_masks, out.iou_scores]


def _sam(kind: str) -> Case:
    import transformers

    vision = {
        "hidden_size": DIM,
        "output_channels": DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "window_size": 3,
        "global_attn_indexes": [1],
        "num_pos_feats": DIM // 2,
        "mlp_dim": 64,
    }
    prompt = {"hidden_size": DIM, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    decoder = DECODER | ({"vit_dim": DIM} if kind == "SamHQ" else {})
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
    return Case(getattr(transformers, f"{kind}Model")(config), _prompts(64), masks)


def _hiera(dim: int = DIM) -> dict[str, Any]:
    return {
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 16,
            "image_size": [128, 128],
            "blocks_per_stage": [1, 1, 2, 1],
            "embed_dim_per_stage": [16, 32, 64, 128],
            "num_attention_heads_per_stage": [1, 2, 4, 8],
            "window_size_per_stage": [8, 4, 4, 2],
            "global_attention_blocks": [3],
            "window_positional_embedding_background_size": [4, 4],
        },
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "fpn_hidden_size": dim,
    }


def _repvit(dim: int = DIM) -> dict[str, Any]:
    return {
        "backbone_config": {
            "model_type": "timm_wrapper",
            "architecture": "repvit_m1",
            "do_pooling": False,
            "num_classes": 2,
            "model_args": {
                "in_chans": 3,
                "features_only": True,
                "out_indices": [0, 1, 2, 3],
                "embed_dim": [16, 32, 48, 64],
                "depth": [1, 1, 1, 1],
            },
        },
        "backbone_channel_list": [64, 48, 32, 16],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "fpn_hidden_size": dim,
    }


def _prompt_encoder(side: int, patch: int, dim: int = DIM) -> dict[str, Any]:
    return {"hidden_size": dim, "image_size": side, "patch_size": patch, "mask_input_channels": 4}


def _sam2() -> Case:
    from transformers import Sam2Config, Sam2Model

    config = Sam2Config(
        vision_config=_hiera(), prompt_encoder_config=_prompt_encoder(128, 16), mask_decoder_config=DECODER
    )
    return Case(Sam2Model(config), _prompts(128), masks)


def _edgetam() -> Case:
    from transformers import EdgeTamConfig, EdgeTamModel

    config = EdgeTamConfig(
        vision_config=_repvit(), prompt_encoder_config=_prompt_encoder(128, 16), mask_decoder_config=DECODER
    )
    return Case(EdgeTamModel(config), _prompts(128), masks)


#: The memory has 64 channels in the code whatever the config says, and a pointer to an object is a multiple of them.
VIDEO_DIM = 128
MEMORY = {
    "image_size": 128,
    "num_maskmem": 3,
    "memory_attention_hidden_size": VIDEO_DIM,
    "memory_attention_num_layers": 2,
    "memory_attention_rope_feat_sizes": [8, 8],
    "memory_encoder_hidden_size": VIDEO_DIM,
    "mask_downsampler_embed_dim": VIDEO_DIM,
    "memory_fuser_embed_dim": VIDEO_DIM,
    "memory_fuser_intermediate_dim": 128,
    "max_object_pointers_in_encoder": 3,
}


def _video(model: nn.Module) -> Case:
    with torch.no_grad():  # an object that is judged absent has the same logit everywhere
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(20.0)
    clips = [torch.cat([image(128, seed=seed + 10 * frame) for frame in range(3)]) for seed in range(2)]
    return Case(model, clips, _track)


def _track(model: nn.Module, clip: Tensor) -> list[Tensor]:
    """Masks (T, 1, h, w) of one object that a click on the first frame names."""
    module = importlib.import_module(type(model).__module__)
    session_type = next(value for name, value in vars(module).items() if name.endswith("VideoInferenceSession"))
    session = session_type(video=clip, video_height=128, video_width=128, dtype=torch.float32)
    index = session.obj_id_to_idx(1)
    clicks, labels = points(128)
    session.add_point_inputs(index, 0, {"point_coords": clicks[None, :1], "point_labels": labels[None, :1]})
    session.obj_with_new_inputs = [1]
    return [model(inference_session=session, frame_idx=frame).pred_masks for frame in range(len(clip))]


def _sam2_video() -> Case:
    from transformers import Sam2VideoConfig, Sam2VideoModel

    config = Sam2VideoConfig(
        vision_config={"model_type": "sam2_vision_model", **_hiera(VIDEO_DIM)},
        prompt_encoder_config=_prompt_encoder(128, 16, VIDEO_DIM),
        mask_decoder_config=DECODER | {"hidden_size": VIDEO_DIM},
        memory_attention_feed_forward_hidden_size=64,
        **MEMORY,
    )
    return _video(Sam2VideoModel(config))


def _edgetam_video() -> Case:
    from transformers import EdgeTamVideoConfig, EdgeTamVideoModel

    config = EdgeTamVideoConfig(
        vision_config={"model_type": "edgetam_vision_model", **_repvit(VIDEO_DIM)},
        prompt_encoder_config=_prompt_encoder(128, 16, VIDEO_DIM),
        mask_decoder_config=DECODER | {"hidden_size": VIDEO_DIM},
        memory_attention_mlp_hidden_size=64,
        memory_attention_rope_k_sizes=[4, 4],
        perceiver_resampler_num_latents=16,
        perceiver_resampler_num_latents_2d=16,
        perceiver_resampler_mlp_intermediate_size=64,
        **MEMORY,
    )
    return _video(EdgeTamVideoModel(config))


def _sam3_vision() -> dict[str, Any]:
    return {
        "backbone_config": {
            "model_type": "sam3_vit_model",
            "hidden_size": DIM,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 112,
            "patch_size": 14,
            "window_size": 4,
            "global_attn_indexes": [1],
            "pretrain_image_size": 56,
        },
        "fpn_hidden_size": DIM,
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    }


def _sam3() -> Case:
    from transformers import Sam3Config, Sam3Model

    detr = {"hidden_size": DIM, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "dropout": 0.0}
    text = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    config = Sam3Config(
        vision_config=_sam3_vision(),
        text_config=text,
        geometry_encoder_config=detr | {"num_layers": 1},
        detr_encoder_config=detr,
        detr_decoder_config=detr | {"num_queries": 6},
        mask_decoder_config={"hidden_size": DIM, "num_attention_heads": 2},
    )
    words = torch.tensor([[0, 7, 9, 1, 2, 2, 2, 2]])
    item = {"input_ids": words, "attention_mask": (words != 2).long()}
    items = [{"pixel_values": image(112, seed=seed), **item} for seed in range(ITEMS)]
    return Case(Sam3Model(config), items, _detect)


def _detect(model: nn.Module, item: dict[str, Tensor]) -> Sequence[Tensor]:
    out = model(**item)
    return [out.pred_masks, out.pred_boxes, out.pred_logits]


def _sam3_tracker() -> Case:
    from transformers import Sam3TrackerConfig, Sam3TrackerModel

    config = Sam3TrackerConfig(
        vision_config=_sam3_vision(), prompt_encoder_config=_prompt_encoder(112, 14), mask_decoder_config=DECODER
    )
    return Case(Sam3TrackerModel(config), _prompts(112), masks)


FAMILIES = [
    Family("SAM", "transformers", lambda: _sam("Sam")),
    Family("SAM-HQ", "transformers", lambda: _sam("SamHQ")),
    Family("SAM 2", "transformers", _sam2),
    Family("SAM 2 video", "transformers", _sam2_video),
    Family("EdgeTAM", "transformers", _edgetam),
    Family("EdgeTAM video", "transformers", _edgetam_video),
    Family("SAM 3", "transformers", _sam3),
    Family("SAM 3 tracker", "transformers", _sam3_tracker),
]
