# SPDX-License-Identifier: Apache-2.0
# Calibrated with boxes, clicks, mask inputs and everything mode's grid; every kind is measured.
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
    everything=dict(num_images=4, points_per_side=16, pred_iou_thresh=0.5, stability_score_thresh=0.7),
)
