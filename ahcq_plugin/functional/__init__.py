# SPDX-License-Identifier: Apache-2.0
"""Pure tensor functions; every quantizer family is a module with an ``encode``/``decode`` pair."""
