# SPDX-License-Identifier: Apache-2.0
# Eight videos, the first four frames of each, to calibrate; a child adds the data. The model stands in for the SAM 2.
custom_imports = dict(imports=["ahcq_plugin.mm"])
default_scope = "mmdet"
log_level = "WARNING"  # progress bars and the table say the rest
model = dict(type="NoDetector")
test_dataloader = dict(batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False))
test_evaluator = dict(type="JFMetric")
test_cfg = dict(
    type="VideoPTQLoop",
    calib=dict(num_videos=8, num_frames=4, seed=0),
    cache_dir="work_dirs/cache",  # floating-point results, for all runs
)
