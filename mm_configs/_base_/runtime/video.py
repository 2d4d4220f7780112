# SPDX-License-Identifier: Apache-2.0
# A child config adds the data set and test_cfg = dict(type='VideoPTQLoop', ...). The model stands in for the SAM 2.
custom_imports = dict(imports=["ahcq_plugin.mm"])
default_scope = "mmdet"
log_level = "WARNING"  # progress bars and the table say the rest
model = dict(type="NoDetector")
test_dataloader = dict(batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False))
test_evaluator = dict(type="JFMetric")
