# SPDX-License-Identifier: Apache-2.0
# Drawn on first use; calibration and evaluation differ by seed.
eval_dataset = dict(type="GeneratedScenes", data_root="work_dirs/scenes", count=64, seed=0)
calib_dataset = dict(type="GeneratedScenes", data_root="work_dirs/scenes", count=32, seed=1)
