# SPDX-License-Identifier: Apache-2.0
# SAM-B at W4A4 with the boxes of Faster R-CNN R50 with a score of at least 0.05 on COCO val2017.
_base_ = ["./_base_/detectors/faster_rcnn_r50.py", "./_base_/sam/sam_b.py", "./_base_/published.py"]
