# SPDX-License-Identifier: Apache-2.0
"""Training of the small Segment Anything models from nothing: samples, losses and the resumable loop."""
