# SPDX-License-Identifier: Apache-2.0
# SAM-L at W4A4 with the boxes of YOLOX-L with a score of at least 0.05 on COCO val2017.
_base_ = ["./_base_/detectors/yolox_l.py", "./_base_/sam/sam_l.py", "./_base_/published.py"]
