# SPDX-License-Identifier: Apache-2.0
# Eight videos, the first four frames of each, to calibrate.
_base_ = [
    "./_base_/datasets/davis.py",
    "./_base_/sam/sam2_s.py",
    "./_base_/quant/ahcq_w4a4.py",
    "./_base_/runtime/video.py",
]
recipe = dict(iterations=20000)
test_dataloader = dict(dataset={{_base_.eval_dataset}})
test_cfg = dict(
    type="VideoPTQLoop",
    calib=dict(dataset={{_base_.calib_dataset}}, num_videos=8, num_frames=4, seed=0),
    cache_dir="work_dirs/cache",  # floating-point results, for all runs
)
