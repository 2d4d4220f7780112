# SPDX-License-Identifier: Apache-2.0
"""How good a packaged Sam is, how much it needs its image, and what its weights and activations look like."""
