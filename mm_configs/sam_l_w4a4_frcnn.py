# SPDX-License-Identifier: Apache-2.0
# SAM-L at W4A4 with the boxes of Faster R-CNN R50 with a score of at least 0.05 on COCO val2017.
_base_ = [
    "./_base_/datasets/coco.py",
    "./_base_/detectors/faster_rcnn_r50.py",
    "./_base_/sam/sam_l.py",
    "./_base_/quant/ahcq_w4a4.py",
    "./_base_/runtime/ptq.py",
]
test_cfg = dict(
    type="PTQLoop", score_thr=0.05, calib=dict(num_images=32, max_boxes=16, seed=0), cache_dir="work_dirs/cache"
)
