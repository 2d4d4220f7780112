# SPDX-License-Identifier: Apache-2.0
# Drawn on first use; calibration and evaluation differ by seed.
_base_ = "../runtime/video.py"
test_dataloader = dict(dataset=dict(type="GeneratedClips", data_root="work_dirs/clips", count=16, frames=12, seed=0))
test_cfg = dict(calib=dict(dataset=dict(type="GeneratedClips", data_root="work_dirs/clips", count=8, frames=4, seed=2)))
