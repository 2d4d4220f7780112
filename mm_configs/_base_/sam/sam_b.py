# SPDX-License-Identifier: Apache-2.0
sam = dict(name="vit_b", checkpoint="checkpoints/sam_vit_b_01ec64.pth")
