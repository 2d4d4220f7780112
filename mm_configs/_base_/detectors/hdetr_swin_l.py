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
detector_source = (
    "download https://github.com/HDETR/H-Deformable-DETR/releases/download/v0.1/decay0.05_drop_path0.5_swin_large_hybrid_"
    "branch_lambda1_group6_t1500_n900_dp0_mqs_lft_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage_36eps"
    ".pth and convert it: python tools/convert_hdetr.py <it> checkpoints/hdetr_swin_l.pth "
    "--config mm_configs/_base_/detectors/hdetr_swin_l.py"
)
