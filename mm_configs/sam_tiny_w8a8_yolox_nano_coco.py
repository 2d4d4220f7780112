# SPDX-License-Identifier: Apache-2.0
_base_ = "./sam_tiny_w4a4_yolox_nano_coco.py"
recipe = dict(w_bits=8, a_bits=8)
