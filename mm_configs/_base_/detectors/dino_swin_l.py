# SPDX-License-Identifier: Apache-2.0
# mmdet's DINO Swin-L with five scales, 36 epochs; all of its training settings are inherited and unused.
_base_ = ["mmdet::dino/dino-5scale_swin-l_8xb2-36e_coco.py", "../runtime/ptq.py"]
log_level = "WARNING"  # progress bars and the table say the rest
model = dict(test_cfg=dict(max_per_img=100))
load_from = "checkpoints/dino-5scale_swin-l_8xb2-36e_coco-5486e051.pth"
test_cfg = dict(**_base_.pop("ptq_loop"), score_thr=0.0)  # its 100 highest-scoring boxes
