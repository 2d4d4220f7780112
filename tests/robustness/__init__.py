# SPDX-License-Identifier: Apache-2.0
"""Bad input of every kind in every place that takes input, each tried in a process of its own.

``python -m tests.robustness`` tries all cases and prints the table of outcomes; the suite tries some.
"""
