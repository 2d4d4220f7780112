# SPDX-License-Identifier: Apache-2.0
# H-Deformable-DETR R50, 36 epochs, sizes of its official scripts; all training settings are inherited and unused.
_base_ = ["mmdet::deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py", "../runtime/ptq.py"]
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
test_cfg = dict(**_base_.pop("ptq_loop"), score_thr=0.0)  # its 100 highest-scoring boxes
