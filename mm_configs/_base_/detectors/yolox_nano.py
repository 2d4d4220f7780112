# SPDX-License-Identifier: Apache-2.0
# mmdet's YOLOX-nano with converted weights; all of its training settings are inherited and unused.
_base_ = ["mmdet::yolox/yolox_nano_8xb8-300e_coco.py", "../runtime/ptq.py"]
log_level = "WARNING"  # progress bars and the table say the rest
load_from = "checkpoints/yolox_nano.pth"
test_cfg = _base_.pop("ptq_loop")
