#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What is quantized of each SAM that the configs name, as a page of the documentation."""

import argparse

from ahcq_plugin.studies.coverage_table import SAM2S, SAMS, coverage_page, sam2_coverage, sam_coverage
from ahcq_plugin.support.arguments import writable_file
from ahcq_plugin.support.files import write_text
from ahcq_plugin.support.tool import run_tool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[*SAMS, *SAM2S], choices=[*SAMS, *SAM2S])
    parser.add_argument("--out", type=writable_file, default="docs/coverage.md")
    args = parser.parse_args()
    rows = [(name, sam_coverage(name) if name in SAMS else sam2_coverage(name)) for name in args.models]
    page = coverage_page(rows)
    write_text(page, args.out)
    print(page)


if __name__ == "__main__":
    run_tool(main)
