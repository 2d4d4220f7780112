# SPDX-License-Identifier: Apache-2.0
# SAM-L at W6A6 with the 100 highest-scoring boxes of H-Deformable-DETR R50 on COCO val2017.
_base_ = [
    "./_base_/datasets/coco.py",
    "./_base_/detectors/hdetr_r50.py",
    "./_base_/sam/sam_l.py",
    "./_base_/quant/ahcq_w6a6.py",
    "./_base_/runtime/ptq.py",
]
test_cfg = dict(
    type="PTQLoop", score_thr=0.0, calib=dict(num_images=32, max_boxes=16, seed=0), cache_dir="work_dirs/cache"
)
