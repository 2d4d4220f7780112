# SPDX-License-Identifier: Apache-2.0
# H-Deformable-DETR Swin-L with 900 queries, 36 epochs, as hdetr_r50.py.
_base_ = "./hdetr_r50.py"
model = dict(
    num_queries=900,
    backbone=dict(
        _delete_=True,
        type="SwinTransformer",
        embed_dims=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=7,
        drop_path_rate=0.5,
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[384, 768, 1536]),
)
load_from = "checkpoints/hdetr_swin_l.pth"
