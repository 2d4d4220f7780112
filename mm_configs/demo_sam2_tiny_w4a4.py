# SPDX-License-Identifier: Apache-2.0
# Embedded weights and generated clips: video object segmentation anywhere, in minutes on two cores.
_base_ = [
    "./_base_/datasets/generated_clips.py",
    "./_base_/sam/sam2_tiny.py",
    "./_base_/quant/ahcq_w4a4_short.py",
    "./_base_/runtime/video.py",
]
recipe = dict(iterations=100, scale_lr=4e-4)
test_dataloader = dict(dataset={{_base_.eval_dataset}})
test_cfg = dict(
    type="VideoPTQLoop",
    calib=dict(dataset={{_base_.calib_dataset}}, num_videos=4, num_frames=4, max_objects=2, seed=0),
    cache_dir="work_dirs/cache",  # floating-point results, for all runs
)
