# SPDX-License-Identifier: Apache-2.0
"""Fill and print the tables of results and ablations of one config; resumable, cached run by run.

Examples:
    AHCQ_DATA=data python tools/results_table.py --fill --write       # everything that is missing (many hours)
    AHCQ_DATA=data python tools/results_table.py --fill --table softmax
    python tools/results_table.py --suite clips --fill --write        # SAM 2 on generated clips
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in ptq.py

from ahcq_plugin.studies.results import Cell, cell_key, fill
from ahcq_plugin.studies.results_suites import SUITES
from ahcq_plugin.studies.results_tables import markdown, page, stages_table, update_readme
from ahcq_plugin.support.arguments import writable_folder
from ahcq_plugin.support.files import write_text
from ahcq_plugin.support.tool import run_tool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="images", choices=sorted(SUITES), help="which model and data")
    parser.add_argument("--config", help="default: the suite's")
    parser.add_argument(
        "--folder", type=writable_folder, help="where each run's figures are kept; default: the suite's"
    )
    parser.add_argument("--work-dir", type=writable_folder, help="default: work_dirs/<name of the folder>")
    parser.add_argument(
        "--table", nargs="+", choices=[t.name for s in SUITES.values() for t in s.tables], metavar="TABLE"
    )
    parser.add_argument("--fill", action="store_true", help="run what has no figures yet")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="fill these only, as ahcq_w4a4 or qdrop_w4a4-hluq-s1")
    parser.add_argument("--write", action="store_true", help="write <folder>.md, its pictures and README's table")
    args = parser.parse_args()
    suite = SUITES[args.suite]
    suite = replace(suite, config=args.config or suite.config, folder=args.folder or suite.folder)
    cell_key(suite.config, Cell("rtn", 8))  # of another file there would be a table of gaps
    work_dir = args.work_dir or Path("work_dirs") / suite.folder.name
    tables = [table for table in suite.tables if table.name in (args.table or [t.name for t in suite.tables])]
    cells = {cell.name: cell for cell in sorted((c for t in tables for c in t.cells()), key=lambda cell: cell.seed)}
    unknown = sorted(set(args.only or ()) - set(cells))
    if unknown:
        parser.error(f"unknown run {', '.join(unknown)}; allowed: {', '.join(cells)}")
    chosen = [cells[name] for name in args.only or cells]
    failed = fill(suite.config, suite.folder, work_dir, chosen) if args.fill else []
    for table in tables:
        print(f"{table.title}\n\n{markdown(suite.config, suite.folder, table.rows, columns=suite.columns)}\n")
    if args.write:
        write_text(page(suite), suite.folder.with_suffix(".md"))
    if args.write and args.suite == "images":
        parts = [markdown(suite.config, suite.folder, suite.tables[0].rows, gaps=False)]
        parts.append(stages_table(suite.config, suite.folder, Cell("ahcq", 4)))
        update_readme(Path("README.md"), "\n\n".join(filter(None, parts)))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_tool(main)
