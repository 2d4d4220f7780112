# SPDX-License-Identifier: Apache-2.0
"""Floating point beside quantized: masks, average precision, J and F."""
