# SPDX-License-Identifier: Apache-2.0
sam = dict(name="vit_l", checkpoint="checkpoints/sam_vit_l_0b3195.pth")
