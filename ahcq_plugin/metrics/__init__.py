# SPDX-License-Identifier: Apache-2.0
"""Measures of masks: overlap of two masks, and the official J and F of videos."""
