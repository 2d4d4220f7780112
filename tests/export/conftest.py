# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the export tests: the packaged SAM."""

from tests.packaged import quantized, real_images, scenes, spec

__all__ = ["quantized", "real_images", "scenes", "spec"]
