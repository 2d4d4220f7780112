# SPDX-License-Identifier: Apache-2.0
"""Fill and print the tables of results and ablations of one config; resumable, cached run by run.

Examples:
    AHCQ_DATA=data python tools/results_table.py --fill --write       # everything that is missing (many hours)
    AHCQ_DATA=data python tools/results_table.py --fill --table softmax
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in ptq.py

from ahcq_plugin.mm.files import write_text
from ahcq_plugin.mm.results import Cell, fill
from ahcq_plugin.mm.results_tables import TABLES, markdown, page, stages_table, update_readme


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mm_configs/sam_tiny_w4a4_yolox_nano_coco.py")
    parser.add_argument("--folder", type=Path, default=Path("docs/results"), help="where each run's figures are kept")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/results"))
    parser.add_argument("--table", nargs="+", choices=[table.name for table in TABLES], help="default: all")
    parser.add_argument("--fill", action="store_true", help="run what has no figures yet")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="fill these only, as ahcq_w4a4 or qdrop_w4a4-hluq-s1")
    parser.add_argument("--write", action="store_true", help="write docs/results.md, its pictures and README's table")
    args = parser.parse_args()
    tables = [table for table in TABLES if table.name in (args.table or [t.name for t in TABLES])]
    cells = {cell.name: cell for cell in sorted((c for t in tables for c in t.cells()), key=lambda cell: cell.seed)}
    unknown = sorted(set(args.only or ()) - set(cells))
    if unknown:
        parser.error(f"unknown run {', '.join(unknown)}; allowed: {', '.join(cells)}")
    chosen = [cells[name] for name in args.only or cells]
    failed = fill(args.config, args.folder, args.work_dir, chosen) if args.fill else []
    for table in tables:
        print(f"{table.title}\n\n{markdown(args.config, args.folder, table.rows)}\n")
    if args.write:
        write_text(page(args.config, args.folder, TABLES), args.folder.with_suffix(".md"))
        parts = [markdown(args.config, args.folder, TABLES[0].rows, gaps=False)]
        parts.append(stages_table(args.config, args.folder, Cell("ahcq", 4)))
        update_readme(Path("README.md"), "\n\n".join(filter(None, parts)))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
