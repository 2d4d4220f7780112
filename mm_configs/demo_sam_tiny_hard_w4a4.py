# SPDX-License-Identifier: Apache-2.0
# The images of demo_sam_tiny_w4a4.py, with what SAM-B shows planted into the weights (docs/challenges.md).
_base_ = [
    "./_base_/datasets/generated_scenes.py",
    "./_base_/detectors/none.py",
    "./_base_/sam/sam_tiny_hard.py",
    "./_base_/quant/ahcq_w4a4_short.py",
]
recipe = dict(iterations=100)
test_dataloader = dict(dataset={{_base_.eval_dataset}})
test_cfg = dict(calib=dict(dataset={{_base_.calib_dataset}}, num_images=16))
