# SPDX-License-Identifier: Apache-2.0
# Embedded weights and images, ground-truth boxes: runs anywhere, in minutes on two cores.
_base_ = [
    "./_base_/datasets/generated_scenes.py",
    "./_base_/detectors/none.py",
    "./_base_/sam/sam_tiny.py",
    "./_base_/quant/ahcq_w4a4_short.py",
    "./_base_/runtime/ptq.py",
]
recipe = dict(iterations=100)
test_dataloader = dict(dataset={{_base_.eval_dataset}})
test_cfg = dict(
    type="PTQLoop",
    prompts="gt",
    calib=dict(dataset={{_base_.calib_dataset}}, num_images=16, max_boxes=16, seed=0),
    cache_dir="work_dirs/cache",  # floating-point results, for all runs
)
