# SPDX-License-Identifier: Apache-2.0
default_scope = 'mmdet'
custom_imports = dict(imports=['ahcq_plugin.mm'])
log_level = 'WARNING'
load_from = None
env_cfg = dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0))
default_hooks = dict(logger=None, timer=None, checkpoint=None, param_scheduler=None)
