# SPDX-License-Identifier: Apache-2.0
# SAM-L at W4A4 with the 100 highest-scoring boxes of DINO FocalNet-L on COCO val2017.
_base_ = ["./_base_/detectors/dino_focalnet_l.py", "./_base_/sam/sam_l.py", "./_base_/published.py"]
