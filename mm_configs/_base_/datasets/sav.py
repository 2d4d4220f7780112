# SPDX-License-Identifier: Apache-2.0
# SA-V: evaluation on val, calibration on videos of test (the training set has another layout).
_base_ = "../runtime/video.py"
data_source = (
    "SA-V val and test from https://ai.meta.com/datasets/segment-anything-video belong into data/sav_val, sav_test"
)
test_dataloader = dict(dataset=dict(type="VideoFolder", data_root="data/sav_val", layout="sav", split="val"))
test_cfg = dict(calib=dict(dataset=dict(type="VideoFolder", data_root="data/sav_test", layout="sav", split="test")))
