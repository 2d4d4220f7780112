# SPDX-License-Identifier: Apache-2.0
# mmdet's YOLOX-L; all of its training settings are inherited and unused.
_base_ = ["mmdet::yolox/yolox_l_8xb8-300e_coco.py", "../runtime/ptq.py"]
log_level = "WARNING"  # progress bars and the table say the rest
model = dict(test_cfg=dict(score_thr=0.05))
load_from = "checkpoints/yolox_l_8x8_300e_coco_20211126_140236-d3bd2b23.pth"
test_cfg = dict(**_base_.pop("ptq_loop"), score_thr=0.05)
