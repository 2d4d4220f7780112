# SPDX-License-Identifier: Apache-2.0
# What makes an MMDetection config a PTQ run. MMEngine forbids two bases that both define `test_cfg`, and MMDetection's
# configs do; so the loop has a name of its own here, and the bases under detectors/ put it into `test_cfg`.
custom_imports = dict(imports=["ahcq_plugin.mm"])
ptq_loop = dict(
    type="PTQLoop",
    calib=dict(num_images=32, max_boxes=16, seed=0),
    cache_dir="work_dirs/cache",  # detections and floating-point results, for all runs
)
