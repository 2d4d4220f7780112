# SPDX-License-Identifier: Apache-2.0
# Few iterations need larger steps: scale_lr keeps the product with the 20,000 iterations of the published settings.
_base_ = "./ahcq_w4a4.py"
recipe = dict(iterations=300, rounding_lr=3e-2, scale_lr=2.7e-3)
