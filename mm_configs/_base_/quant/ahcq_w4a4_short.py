# SPDX-License-Identifier: Apache-2.0
# Few iterations need larger steps than the 20,000 of the published settings.
recipe = dict(name="ahcq", w_bits=4, a_bits=4, iterations=300, rounding_lr=3e-2, scale_lr=4e-4)
