# SPDX-License-Identifier: Apache-2.0
sam = dict(name="sam2_bp", checkpoint=None)  # None: the published file in checkpoints/
