#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Quantize twins of sam_tiny, one challenge of SAM-B planted in each, with every method; write docs/challenges.md.

Resumable: each cell's figures are kept, and made again only when weights, settings or data have changed.

Examples:
    python tools/challenges.py --fill --write                  # everything that is missing, calibrated alone
    python tools/challenges.py --fill --reconstructed --write  # the main recipes with reconstruction besides
    python tools/challenges.py --fill --challenge none all --method rtn ahcq
"""

import argparse
from pathlib import Path

from ahcq_plugin.studies.challenges import CALIBRATED, CHALLENGES, RECONSTRUCTED, cells, fill
from ahcq_plugin.studies.challenges_page import overlap_table, page
from ahcq_plugin.studies.results_tables import update_readme
from ahcq_plugin.support.arguments import writable_folder
from ahcq_plugin.support.tool import run_tool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=writable_folder, default=Path("docs/challenges"), help="where figures are kept"
    )
    parser.add_argument("--fill", action="store_true", help="run what has no figures yet")
    parser.add_argument("--challenge", nargs="+", choices=list(CHALLENGES), default=list(CHALLENGES), metavar="NAME")
    parser.add_argument("--method", nargs="+", metavar="LABEL", help="of the table's rows; default: all")
    parser.add_argument("--reconstructed", action="store_true", help="the main recipes with reconstruction too")
    parser.add_argument("--write", action="store_true", help="write <folder>.md and its pictures")
    args = parser.parse_args()
    methods = {method.label: method for method in (*CALIBRATED, *(RECONSTRUCTED if args.reconstructed else ()))}
    unknown = sorted(set(args.method or ()) - set(methods))
    if unknown:
        parser.error(f"unknown method {', '.join(unknown)}; allowed: {', '.join(methods)}")
    chosen = [methods[label] for label in args.method or methods]
    if args.fill:
        wanted = [cell for cell in cells(chosen) if cell.challenge in args.challenge]
        fill(args.folder, wanted, lambda line: print(line, flush=True))
    print(overlap_table(args.folder, list(methods.values())))
    if args.write:
        update_readme(args.folder.with_suffix(".md"), page(args.folder, CALIBRATED))


if __name__ == "__main__":
    run_tool(main)
