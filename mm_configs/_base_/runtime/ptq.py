# SPDX-License-Identifier: Apache-2.0
# A child config adds test_cfg = dict(type='PTQLoop', ...): that and this import make an MMDetection config a PTQ run.
custom_imports = dict(imports=["ahcq_plugin.mm"])
