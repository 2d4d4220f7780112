# SPDX-License-Identifier: Apache-2.0
# The setting of the published tables: COCO val2017, 20,000 iterations a unit.
_base_ = ["./datasets/coco.py", "./quant/ahcq_w4a4.py"]
