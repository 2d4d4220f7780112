# SPDX-License-Identifier: Apache-2.0
# DINO with FocalNet-L (four focal levels), five scales: the detector of the papers' DINO columns; needs timm.
_base_ = ["mmdet::dino/dino-5scale_swin-l_8xb2-36e_coco.py", "../runtime/ptq.py"]
log_level = "WARNING"  # progress bars and the table say the rest
model = dict(
    backbone=dict(
        _delete_=True,
        type="TimmFocalNet",
        embed_dim=192,
        depths=[2, 2, 18, 2],
        focal_levels=[4, 4, 4, 4],
        focal_windows=[3, 3, 3, 3],
        use_overlap_down=True,
        use_post_norm=True,
        layerscale_value=1e-4,
        drop_path_rate=0.3,
    ),
    neck=dict(bias=True),
    test_cfg=dict(max_per_img=100),
)
load_from = "checkpoints/dino_focalnet_l.pth"
test_cfg = dict(**_base_.pop("ptq_loop"), score_thr=0.0)  # its 100 highest-scoring boxes
