# SPDX-License-Identifier: Apache-2.0
# No detector: the boxes come from the data set.
_base_ = "../runtime/ptq.py"
default_scope = "mmdet"
log_level = "WARNING"  # progress bars and the table say the rest
model = dict(type="NoDetector")
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        test_mode=True,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape")),
        ],
    ),
)
test_evaluator = dict(type="ExactCocoMetric", metric="segm")
test_cfg = dict(**_base_.pop("ptq_loop"), prompts="gt")
