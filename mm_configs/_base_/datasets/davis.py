# SPDX-License-Identifier: Apache-2.0
# DAVIS-2017: evaluation on val, calibration on train.
_base_ = "../runtime/video.py"
data_source = (
    "DAVIS 2017 (480p) from https://davischallenge.org belongs into data/DAVIS/{JPEGImages,Annotations,ImageSets}"
)
test_dataloader = dict(dataset=dict(type="VideoFolder", data_root="data/DAVIS", layout="davis", split="val"))
test_cfg = dict(calib=dict(dataset=dict(type="VideoFolder", data_root="data/DAVIS", layout="davis", split="train")))
