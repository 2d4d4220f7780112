# SPDX-License-Identifier: Apache-2.0
sam = dict(name="vit_h", checkpoint="checkpoints/sam_vit_h_4b8939.pth")
