# SPDX-License-Identifier: Apache-2.0
sam = dict(name="sam2_tiny", checkpoint=None)  # None: the packaged weights
