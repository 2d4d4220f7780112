# SPDX-License-Identifier: Apache-2.0
"""What a run shows: tables, pictures and report.html."""
