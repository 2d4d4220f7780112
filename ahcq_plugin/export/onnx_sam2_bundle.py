# SPDX-License-Identifier: Apache-2.0
"""What beside its four graphs a program needs to follow objects with a SAM 2: ``bundle.json`` and small tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ahcq_plugin.export.onnx_bundle import (
    DECODER_FILE,
    ENCODER_FILE,
    MEMORY_ATTENTION_FILE,
    MEMORY_ENCODER_FILE,
    SAM2_FORMAT,
    keep_bundle,
)
from ahcq_plugin.export.onnx_sam2 import CONSTANTS_FILE
from ahcq_plugin.support.files import replacing
from ahcq_plugin.zoo.segment import MEAN, STD

GRAPHS = (ENCODER_FILE, MEMORY_ATTENTION_FILE, MEMORY_ENCODER_FILE, DECODER_FILE)


def write_sam2_bundle(model: Any, path: str | Path, style: str) -> None:
    """Write ``bundle.json`` and the tensors into the folder that has the graphs of ``model``."""
    folder = Path(path)
    arrays: dict[str, Any] = {n: tensor.detach().float().cpu().numpy() for n, tensor in _constants(model).items()}
    with replacing(folder / CONSTANTS_FILE) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
    decoder = model.sam_mask_decoder
    content = {
        "format": SAM2_FORMAT,
        "style": style,
        "bytes": {name: (folder / name).stat().st_size for name in (*GRAPHS, CONSTANTS_FILE)},
        "preprocessing": {
            "channels": "RGB, 0 to 255",
            "image_size": model.image_size,
            "resize": "both sides to image_size, bicubic and antialiased, as Pillow does it",
            "pixel_scale": 255,
            "pixel_mean": list(MEAN),
            "pixel_std": list(STD),
            "normalisation": "(pixel / pixel_scale - pixel_mean) / pixel_std",
        },
        "prompts": {
            "coordinates": "x, y in pixels of the resized frame",
            "labels": {"none": -1, "background": 0, "foreground": 1, "box_top_left": 2, "box_bottom_right": 3},
            "padding_point": "points, or none, are followed by one point (0, 0) with the label none",
            "mask_input_size": list(model.sam_prompt_encoder.mask_input_size),
            "logits_limit": 32.0,
            "of_masks": {"inside": 10.0, "outside": -10.0},
        },
        "postprocessing": {
            "mask_threshold": 0.0,
            "absent": {"score": 0.0, "logit": -1024.0},
            "resize": "bilinear, half-pixel centres, to the frame's size",
        },
        "multimask": {
            "of_prompted_frames": model.multimask_output_in_sam,
            "of_tracked_frames": model.multimask_output_in_sam and model.multimask_output_for_tracking,
            "points": [model.multimask_min_pt_num, model.multimask_max_pt_num],
            "pointer_of_chosen": decoder.use_multimask_token_for_obj_ptr,
            "when_unstable": (
                {
                    "delta": decoder.dynamic_multimask_stability_delta,
                    "threshold": decoder.dynamic_multimask_stability_thresh,
                }
                if decoder.dynamic_multimask_via_stability
                else None
            ),
        },
        "memory": {
            "frames": model.num_maskmem,
            "stride": model.memory_temporal_stride_for_eval,
            "prompted_frames": model.max_cond_frames_in_attn,
            "corrected_frames_are_prompted": model.add_all_frames_to_correct_as_cond,
            "pointers": model.max_obj_ptrs_in_encoder,
            "pointers_have_times": model.add_tpos_enc_to_obj_ptrs,
            "times_have_signs": model.use_signed_tpos_enc_to_obj_ptrs,
            "pointers_of_the_past_alone": model.only_obj_ptrs_in_the_past_for_eval,
            "absent_pointer_replaces": model.fixed_no_obj_ptr,
            "probability_scale": model.sigmoid_scale_for_mem_enc,
            "probability_offset": model.sigmoid_bias_for_mem_enc,
            "prompted_masks_are_binary": model.binarize_mask_from_pts_for_mem_enc,
            "stored_as": "bfloat16",
        },
        "parity": [],
    }
    keep_bundle(content, folder)


@torch.no_grad()
def _constants(model: Any) -> dict[str, Tensor]:
    """Tensors by name: C channels of the image, m of the memory, h * w places.

    ``image_positions`` (1, C, h, w), ``memory_positions`` (h * w, m), ``memory_times`` (frames, m), ``no_memory``
    (1, C, 1, 1), ``no_object_pointer`` (C,), ``no_object_memory`` (m,), ``mask_weight`` (4, 4) and ``mask_bias`` (1,)
    of the convolution that makes a mask the decoder's input, ``time_weight`` (m, C) and ``time_bias`` (m,) of the
    layer behind the times of pointers; the last two and ``no_object_memory`` only where the model has them.
    """
    device, grid = next(model.parameters()).device, model.sam_image_embedding_size
    image = torch.zeros(1, model.hidden_dim, grid, grid, device=device)
    memory = model.memory_encoder.position_encoding(image[:, : model.mem_dim])
    found = {
        "image_positions": model.image_encoder.neck.position_encoding(image),
        "memory_positions": memory[0].flatten(1).T,
        "memory_times": model.maskmem_tpos_enc[:, 0, 0],
        "no_memory": model.no_mem_embed.reshape(1, -1, 1, 1),
        "no_object_pointer": model.no_obj_ptr[0],
        "mask_weight": model.mask_downsample.weight[0, 0],
        "mask_bias": model.mask_downsample.bias,
    }
    if model.no_obj_embed_spatial is not None:
        found["no_object_memory"] = model.no_obj_embed_spatial[0]
    if isinstance(model.obj_ptr_tpos_proj, nn.Linear):
        found |= {"time_weight": model.obj_ptr_tpos_proj.weight, "time_bias": model.obj_ptr_tpos_proj.bias}
    return found
