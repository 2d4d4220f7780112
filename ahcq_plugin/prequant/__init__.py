# SPDX-License-Identifier: Apache-2.0
"""Transforms of weights before quantization; pure functions of tensors."""
