# SPDX-License-Identifier: Apache-2.0
"""Measures of masks: their overlap, the official J and F of videos, limits of a mean by bootstrap over images."""
