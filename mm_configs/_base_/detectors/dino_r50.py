# SPDX-License-Identifier: Apache-2.0
# mmdet's DINO R50 with four scales, 12 epochs; all of its training settings are inherited and unused.
_base_ = "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py"
log_level = "WARNING"  # progress bars and the table say the rest
model = dict(test_cfg=dict(max_per_img=100))
load_from = "checkpoints/dino-4scale_r50_8xb2-12e_coco_20221202_182705-55b2bba2.pth"
detector_source = (
    "download https://download.openmmlab.com/mmdetection/v3.0/dino/dino-4scale_r50_8xb2-12e_coco/"
    "dino-4scale_r50_8xb2-12e_coco_20221202_182705-55b2bba2.pth into checkpoints/"
)
