# SPDX-License-Identifier: Apache-2.0
# Generated on first use; calibration and evaluation differ by seed.
_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape')),
]
calib_dataset = dict(type='GeneratedScenes', data_root='work_dirs/scenes', count=32, seed=1)
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='GeneratedScenes', data_root='work_dirs/scenes', count=64, seed=0, test_mode=True, pipeline=_pipeline))
test_evaluator = dict(type='ExactCocoMetric', metric='segm')
