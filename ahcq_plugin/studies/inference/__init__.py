# SPDX-License-Identifier: Apache-2.0
"""How fast, how large and how true the ways to run a SAM are, in one table; see ``tools/bench_inference.py``."""
