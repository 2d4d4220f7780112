# SPDX-License-Identifier: Apache-2.0
recipe = dict(name="ahcq", w_bits=4, a_bits=4)
