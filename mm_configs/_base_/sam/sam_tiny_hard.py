# SPDX-License-Identifier: Apache-2.0
sam = dict(name="sam_tiny_hard", checkpoint=None)  # None: made of the packaged weights of sam_tiny
