# SPDX-License-Identifier: Apache-2.0
# DAVIS-2017: evaluation on val, calibration on train.
data_source = (
    "DAVIS 2017 (480p) from https://davischallenge.org belongs into data/DAVIS/{JPEGImages,Annotations,ImageSets}"
)
eval_dataset = dict(type="VideoFolder", data_root="data/DAVIS", layout="davis", split="val")
calib_dataset = dict(type="VideoFolder", data_root="data/DAVIS", layout="davis", split="train")
