# SPDX-License-Identifier: Apache-2.0
recipe = dict(name="qdrop", w_bits=4, a_bits=4)
