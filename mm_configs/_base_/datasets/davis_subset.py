# SPDX-License-Identifier: Apache-2.0
# A few DAVIS sequences to evaluate on, every fourth frame; calibration on generated clips.
data_source = "set AHCQ_DATA to a folder with davis/JPEGImages/480p and davis/Annotations/480p"
eval_dataset = dict(type="VideoFolder", data_root="{{$AHCQ_DATA:data}}/davis", layout="davis", every=4)
calib_dataset = dict(type="GeneratedClips", data_root="work_dirs/clips", count=8, frames=4, seed=2)
