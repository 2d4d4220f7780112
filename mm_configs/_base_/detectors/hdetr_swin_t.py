# SPDX-License-Identifier: Apache-2.0
# H-Deformable-DETR Swin-T, 36 epochs, as hdetr_r50.py.
_base_ = "./hdetr_r50.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="SwinTransformer",
        embed_dims=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.2,
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
load_from = "checkpoints/hdetr_swin_t.pth"
