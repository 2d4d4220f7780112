# SPDX-License-Identifier: Apache-2.0
_base_ = "./sam_h_w4a4_frcnn.py"
recipe = dict(w_bits=5, a_bits=5)
