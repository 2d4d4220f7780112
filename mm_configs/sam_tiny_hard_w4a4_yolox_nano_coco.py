# SPDX-License-Identifier: Apache-2.0
# Real images with the boxes of a small detector; the SAM whose tensors are as hard as SAM-B's (docs/challenges.md).
_base_ = [
    "./_base_/datasets/coco_subset.py",
    "./_base_/detectors/yolox_nano.py",
    "./_base_/sam/sam_tiny_hard.py",
    "./_base_/quant/ahcq_w4a4_short.py",
]
test_dataloader = dict(num_workers=0, persistent_workers=False, dataset={{_base_.eval_dataset}})
test_cfg = dict(calib=dict(dataset={{_base_.calib_dataset}}))
