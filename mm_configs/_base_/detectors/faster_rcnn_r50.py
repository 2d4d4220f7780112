# SPDX-License-Identifier: Apache-2.0
# mmdet's Faster R-CNN R50, 2x schedule; all of its training settings are inherited and unused.
_base_ = ["mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py", "../runtime/ptq.py"]
log_level = "WARNING"  # progress bars and the table say the rest
load_from = "checkpoints/faster_rcnn_r50_fpn_2x_coco_bbox_mAP-0.384_20200504_210434-a5d8aa15.pth"
test_cfg = dict(**_base_.pop("ptq_loop"), score_thr=0.05)
