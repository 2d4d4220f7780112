# SPDX-License-Identifier: Apache-2.0
# Real videos for the embedded model.
_base_ = ["./_base_/datasets/davis_subset.py", "./_base_/sam/sam2_tiny.py", "./_base_/quant/ahcq_w4a4_short.py"]
recipe = dict(iterations=100, scale_lr=4e-4)
test_cfg = dict(calib=dict(num_videos=4, max_objects=2))
