# SPDX-License-Identifier: Apache-2.0
"""The self-contained HTML report of a run."""

from __future__ import annotations

import html
import json
from pathlib import Path

from ahcq_plugin.mm.files import write_text
from ahcq_plugin.mm.report_data import ReportData


def write_report(path: str | Path, data: ReportData) -> None:
    """Write one HTML file without external references, atomically."""
    metrics = html.escape(json.dumps(data.metrics, indent=2))
    write_text(f"<!doctype html><meta charset='utf-8'><title>Quantization report</title><pre>{metrics}</pre>\n", path)
