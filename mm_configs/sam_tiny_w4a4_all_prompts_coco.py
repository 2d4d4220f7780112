# SPDX-License-Identifier: Apache-2.0
# Calibrated with boxes, clicks, mask inputs and everything mode's grid; boxes, clicks and mask inputs are
# measured. sam_tiny was trained with boxes: everything mode finds nothing with it, also in floating point.
_base_ = [
    "./_base_/datasets/coco_subset.py",
    "./_base_/detectors/none.py",
    "./_base_/sam/sam_tiny.py",
    "./_base_/quant/ahcq_w4a4_short.py",
]
test_dataloader = dict(dataset={{_base_.eval_dataset}})
test_cfg = dict(
    calib=dict(
        dataset={{_base_.calib_dataset}},
        prompts=dict(box=0.25, click1=0.25, click3=0.125, mask=0.25, grid=0.125),
    ),
    eval_prompts=["click1", "click3", "mask"],
)
