# SPDX-License-Identifier: Apache-2.0
# A few DAVIS sequences to evaluate on, every fourth frame; calibration on generated clips.
_base_ = "../runtime/video.py"
data_source = "set AHCQ_DATA to a folder with davis/JPEGImages/480p and davis/Annotations/480p"
test_dataloader = dict(dataset=dict(type="VideoFolder", data_root="{{$AHCQ_DATA:data}}/davis", layout="davis", every=4))
test_cfg = dict(calib=dict(dataset=dict(type="GeneratedClips", data_root="work_dirs/clips", count=8, frames=4, seed=2)))
