# SPDX-License-Identifier: Apache-2.0
sam = dict(name="sam2_s", checkpoint=None)  # None: the published file in checkpoints/
