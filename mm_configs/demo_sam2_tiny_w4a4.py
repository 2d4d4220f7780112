# SPDX-License-Identifier: Apache-2.0
# Embedded weights and generated clips: video object segmentation anywhere, in minutes on two cores.
_base_ = ["./_base_/datasets/generated_clips.py", "./_base_/sam/sam2_tiny.py", "./_base_/quant/ahcq_w4a4_short.py"]
recipe = dict(iterations=100, scale_lr=4e-4)
test_cfg = dict(calib=dict(num_videos=4, max_objects=2))
