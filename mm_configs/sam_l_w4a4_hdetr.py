# SPDX-License-Identifier: Apache-2.0
# SAM-L at W4A4 with the 100 highest-scoring boxes of H-Deformable-DETR R50 on COCO val2017.
_base_ = ["./_base_/detectors/hdetr_r50.py", "./_base_/sam/sam_l.py", "./_base_/published.py"]
