# SPDX-License-Identifier: Apache-2.0
"""Detectors that MMDetection lacks, and converters of published checkpoints."""
