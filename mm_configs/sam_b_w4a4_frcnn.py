# SPDX-License-Identifier: Apache-2.0
# The setting of the published tables: SAM-B with the boxes of Faster R-CNN on COCO val2017, 32 images to calibrate.
_base_ = [
    "./_base_/datasets/coco.py",
    "./_base_/detectors/faster_rcnn_r50.py",
    "./_base_/sam/sam_b.py",
    "./_base_/quant/ahcq_w4a4.py",
    "./_base_/runtime/ptq.py",
]
recipe = dict(iterations=20000)
test_cfg = dict(
    type="PTQLoop", score_thr=0.05, calib=dict(num_images=32, max_boxes=16, seed=0), cache_dir="work_dirs/cache"
)  # detections and floating-point results, for all runs
