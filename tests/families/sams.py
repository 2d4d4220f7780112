# SPDX-License-Identifier: Apache-2.0
"""SAM and the models made of it, by their authors' own code, cut down where the code allows it.

MobileSAM and TinySAM are written for 1024 pixels and 256 channels; their encoders are narrow here instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tests.conftest import make_clips, make_sam2
from tests.families.case import ITEMS, Case, Family, boxes, image, points

SIDE, PATCH, WIDTH, DIM = 64, 8, 64, 64  # half the width: rounding to 8 bits is off by 12 % instead of 2 %
#: Of the decoder: heads of its layers and their hidden channels (an eighth), channels of the mask's encoder, depth and
#: width of the head that predicts IoU: a head of 32 channels with random weights predicts about 0.
PUBLISHED_DIM, PUBLISHED_DECODER = 256, (8, 256, 16, 3, 256)
NARROW = {
    "in_chans": 3,
    "num_classes": 0,
    "embed_dims": [16, 32, 32, 320],  # the stride of the last merging is 1 for this width
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 2, 10],
    "window_sizes": [7, 7, 14, 7],
    "drop_path_rate": 0.0,
}


def prompted(sam: nn.Module, item: Mapping[str, Tensor], embed: Callable = None, **options: Any) -> Any:
    """Encoder, prompt encoder and decoder for the item's ``boxes`` or ``points`` and ``labels``.

    Args:
        embed: encoder's output -> (embedding, further arguments of the decoder).
        options: further arguments of the decoder.
    """
    embedding, more = (sam.image_encoder(item["image"]), {})
    if embed is not None:
        embedding, more = embed(embedding)
    clicks = (item["points"], item["labels"]) if "points" in item else None
    sparse, dense = sam.prompt_encoder(points=clicks, boxes=item.get("boxes"), masks=None)
    return sam.mask_decoder(
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        **options,
        **more,
    )


def items(side: int, count: int = ITEMS) -> list[dict[str, Tensor]]:
    """Boxes on one image, clicks on the next."""
    clicks, labels = points(side)
    prompts: list[dict[str, Tensor]] = [{"boxes": boxes(side)}, {"points": clicks, "labels": labels}]
    return [{"image": image(side, seed=seed), **prompts[seed % 2]} for seed in range(count)]


def _parts(modeling: Any, side: int = SIDE, patch: int = PATCH, dim: int = DIM, decoder: Any = None) -> dict[str, Any]:
    """Prompt encoder and mask decoder of a package that has SAM's classes; nearly as published where ``dim`` is."""
    grid, decoder = side // patch, decoder or modeling.MaskDecoder
    heads, hidden, channels, depth, width = PUBLISHED_DECODER if dim == PUBLISHED_DIM else (2, 64, 4, 2, 32)
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=dim, mlp_dim=hidden, num_heads=heads)
    return {
        "prompt_encoder": modeling.PromptEncoder(
            embed_dim=dim, image_embedding_size=(grid, grid), input_image_size=(side, side), mask_in_chans=channels
        ),
        "mask_decoder": decoder(
            num_multimask_outputs=3,
            transformer=transformer,
            transformer_dim=dim,
            iou_head_depth=depth,
            iou_head_hidden_dim=width,
        ),
    }


def _vit(modeling: Any, **options: Any) -> nn.Module:
    return modeling.ImageEncoderViT(
        img_size=SIDE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        out_chans=DIM,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
        **options,
    )


_one_mask = partial(prompted, multimask_output=False)


def _sam() -> Case:
    from segment_anything import modeling

    return Case(modeling.Sam(image_encoder=_vit(modeling), **_parts(modeling)), items(SIDE), _one_mask)


def _sam2(name: str) -> Case:
    from ahcq_plugin.zoo.track import clip_forward

    return Case(make_sam2({"name": name, "image_size": 128}), make_clips(2, frames=4, size=128), clip_forward)


def _medsam() -> Case:
    import segment_anything

    if not (Path(segment_anything.__file__).parents[1] / "MedSAM_Inference.py").exists():
        raise ImportError("segment_anything is not MedSAM's copy of it")
    modeling = segment_anything.modeling
    return Case(modeling.Sam(image_encoder=_vit(modeling), **_parts(modeling)), items(SIDE), _one_mask)


def _sam_med2d() -> Case:
    from segment_anything import modeling
    from segment_anything.modeling.image_encoder import Adapter_Layer  # noqa: F401  (SAM has none)

    encoder = _vit(modeling, adapter_train=True)
    sam = modeling.Sam(image_encoder=encoder, **_parts(modeling))
    return Case(sam, items(SIDE), _one_mask, leave=("*.Adapter.spatial.2",))  # transposed convolutions


def _hq_sam() -> Case:
    from segment_anything_hq import modeling

    encoder = _vit(modeling)
    decoder = partial(modeling.MaskDecoderHQ, vit_dim=WIDTH)
    sam = modeling.Sam(image_encoder=encoder, **_parts(modeling, decoder=decoder))
    forward = partial(
        prompted,
        embed=lambda out: (out[0], {"interm_embeddings": out[1]}),
        multimask_output=False,
        hq_token_only=False,
    )
    return Case(sam, items(SIDE), forward)


def _mobile_sam() -> Case:
    from mobile_sam import modeling

    sam = modeling.Sam(modeling.TinyViT(img_size=1024, **NARROW), **_parts(modeling, 1024, 16, 256))
    return Case(sam, items(1024, 2), _one_mask)


def _tiny_sam() -> Case:
    from tinysam import modeling

    sam = modeling.Sam(modeling.TinyViT(img_size=1024, **NARROW), **_parts(modeling, 1024, 16, 256))
    return Case(sam, items(1024, 2), prompted)


def _edge_sam() -> Case:
    # its Sam imports a detector that is in no package and that nothing here uses
    for name in ("projects", "projects.EfficientDet"):
        sys.modules.setdefault(name, ModuleType(name))
    sys.modules["projects.EfficientDet"].efficientdet = None
    from edge_sam import modeling

    # kernel, expansion, channels, squeeze-and-excitation, activation, stride
    modeling.RepViT.arch_settings["cut"] = [
        [3, 2, channels, squeeze, 0, stride]
        for channels in (8, 16, 24, 32)
        for squeeze, stride in ((0, 1 if channels == 8 else 2), (1, 1))
    ]
    encoder = modeling.RepViT("cut", img_size=256, fuse=True)
    sam = modeling.Sam(encoder, **_parts(modeling, 256, 16, 256))
    return Case(sam, items(256), partial(prompted, num_multimask_outputs=1))


def _efficient_sam() -> Case:
    from efficient_sam.efficient_sam import EfficientSam
    from efficient_sam.efficient_sam_decoder import MaskDecoder, PromptEncoder
    from efficient_sam.efficient_sam_encoder import ImageEncoderViT
    from efficient_sam.two_way_transformer import TwoWayTransformer

    dim, grid = PUBLISHED_DIM, SIDE // PATCH
    heads, hidden, _, depth, width = PUBLISHED_DECODER
    encoder = ImageEncoderViT(SIDE, PATCH, 3, 192, "layer_norm", 2, 3, 4.0, [dim, dim], nn.GELU)
    sam = EfficientSam(
        image_encoder=encoder,
        prompt_encoder=PromptEncoder(dim, (grid, grid), (SIDE, SIDE)),
        decoder_max_num_input_points=6,
        mask_decoder=MaskDecoder(
            transformer_dim=dim,
            transformer=TwoWayTransformer(2, dim, heads, hidden, nn.GELU, False),
            num_multimask_outputs=3,
            activation=nn.GELU,
            normalization_type="layer_norm",
            normalize_before_activation=False,
            iou_head_depth=depth,
            iou_head_hidden_dim=width,
            upscaling_layer_dims=[64, 32],
        ),
    )
    corners = boxes(SIDE).reshape(1, 2, 2, 2)
    clicks, labels = points(SIDE)
    prompts = [(corners, torch.tensor([[[2, 3], [2, 3]]])), (clicks[None], labels[None])]
    return Case(
        sam,
        [(image(SIDE, seed=seed), *prompts[seed % 2]) for seed in range(ITEMS)],
    )


class _Sam3Blocks(nn.Module):
    """Image encoder with its pyramid, and the encoder and decoder layers that read it, as SAM 3 calls them."""

    def __init__(self, neck: nn.Module, encoder: nn.Module, decoder: nn.ModuleList):
        super().__init__()
        self.neck, self.encoder, self.decoder = neck, encoder, decoder

    def forward(self, pixels: Tensor, prompt: Tensor, queries: Tensor) -> list[Tensor]:
        features, positions, _, _ = self.neck(pixels)
        (grid, position), size = (
            (x[-1].flatten(2).permute(2, 0, 1) for x in (features, positions)),
            features[-1].shape[-2:],
        )
        fused = self.encoder([grid], prompt, src_pos=[position], feat_sizes=[size])
        for layer in self.decoder:
            queries, _ = layer(
                tgt=queries,
                tgt_query_pos=torch.ones_like(queries),
                memory_text=prompt,
                memory=fused["memory"],
                memory_pos=fused["pos_embed"],
            )
        return [*features, fused["memory"], queries]


def _sam3() -> Case:
    from sam3.model.decoder import TransformerDecoderLayer
    from sam3.model.encoder import TransformerEncoderFusion, TransformerEncoderLayer
    from sam3.model.model_misc import MultiheadAttentionWrapper
    from sam3.model.necks import Sam3DualViTDetNeck
    from sam3.model.position_encoding import PositionEmbeddingSine
    from sam3.model.vitdet import ViT

    trunk = ViT(
        img_size=112,
        pretrain_img_size=56,
        patch_size=14,
        embed_dim=WIDTH,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        norm_layer="LayerNorm",
        global_att_blocks=(1,),
        rel_pos_blocks=(),
        use_rope=True,
        use_interp_rope=True,
        window_size=4,
        retain_cls_token=False,
        ln_pre=True,
        bias_patch_embed=False,
    )
    neck = Sam3DualViTDetNeck(trunk, PositionEmbeddingSine(DIM, normalize=True), DIM, (4.0, 2.0, 1.0))
    attention = partial(MultiheadAttentionWrapper, num_heads=2, embed_dim=DIM)
    layer = TransformerEncoderLayer(
        activation="relu",
        d_model=DIM,
        dim_feedforward=64,
        dropout=0.1,
        pos_enc_at_attn=True,
        pos_enc_at_cross_attn_keys=False,
        pos_enc_at_cross_attn_queries=False,
        pre_norm=True,
        self_attention=attention(batch_first=True),
        cross_attention=attention(batch_first=True),
    )
    encoder = TransformerEncoderFusion(
        layer=layer, num_layers=2, d_model=DIM, num_feature_levels=1, frozen=False, add_pooled_text_to_img_feat=False
    )
    decoder = nn.ModuleList(
        TransformerDecoderLayer("relu", DIM, 64, 0.1, attention(), 2, use_text_cross_attention=True) for _ in range(2)
    )
    model = _Sam3Blocks(neck, encoder, decoder)
    random = torch.Generator().manual_seed(0)
    noise = [(torch.randn(5, 1, DIM, generator=random), torch.randn(6, 1, DIM, generator=random)) for _ in range(ITEMS)]
    return Case(model, [(image(112, seed=seed), *noise[seed]) for seed in range(ITEMS)])


FAMILIES = [
    Family("SAM", "segment-anything", _sam),
    Family("SAM 2.1 with video", "sam2", partial(_sam2, "sam2.1_t")),
    Family("MedSAM", "github.com/bowang-lab/MedSAM", _medsam),
    Family("SAM-Med2D", "github.com/OpenGVLab/SAM-Med2D", _sam_med2d),
    Family("HQ-SAM", "segment-anything-hq", _hq_sam),
    Family("MobileSAM", "github.com/ChaoningZhang/MobileSAM", _mobile_sam),
    Family("TinySAM", "github.com/xinghaochen/TinySAM", _tiny_sam),
    Family("EdgeSAM", "github.com/chongzhou96/EdgeSAM", _edge_sam),
    Family("EfficientSAM", "github.com/yformer/EfficientSAM", _efficient_sam),
    Family("SAM 3: image encoder, decoder blocks", "github.com/facebookresearch/sam3", _sam3),
]
