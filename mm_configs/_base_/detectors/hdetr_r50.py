# SPDX-License-Identifier: Apache-2.0
# H-Deformable-DETR R50, 36 epochs, sizes of its official scripts; all training settings are inherited and unused.
_base_ = "mmdet::deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py"
log_level = "WARNING"  # progress bars and the table say the rest
attention = dict(dropout=0.0)
ffn = dict(feedforward_channels=2048, ffn_drop=0.0)
model = dict(
    type="HDeformableDETR",
    num_queries=300,
    num_queries_one2many=1500,
    neck=dict(bias=True),
    encoder=dict(layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=ffn)),
    decoder=dict(layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=ffn)),
    bbox_head=dict(type="HDeformableDETRHead", k_one2many=6),
    test_cfg=dict(max_per_img=100),
)
load_from = "checkpoints/hdetr_r50.pth"
detector_source = (
    "download https://github.com/HDETR/H-Deformable-DETR/releases/download/v0.1/r50_hybrid_branch_lambda1_group6_t1500_"
    "dp0_mqs_lft_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage_36eps.pth and convert it: "
    "python tools/convert_hdetr.py <it> checkpoints/hdetr_r50.pth --config mm_configs/_base_/detectors/hdetr_r50.py"
)
