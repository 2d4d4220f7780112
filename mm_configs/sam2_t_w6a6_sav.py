# SPDX-License-Identifier: Apache-2.0
_base_ = "./sam2_t_w4a4_sav.py"
recipe = dict(w_bits=6, a_bits=6)
