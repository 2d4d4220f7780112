# SPDX-License-Identifier: Apache-2.0
"""Slow or public ways to compute what the engine computes: what tests and benchmarks compare it with."""
