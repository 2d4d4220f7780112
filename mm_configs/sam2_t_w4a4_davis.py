# SPDX-License-Identifier: Apache-2.0
_base_ = ["./_base_/datasets/davis.py", "./_base_/sam/sam2_t.py", "./_base_/quant/ahcq_w4a4.py"]
