# SPDX-License-Identifier: Apache-2.0
"""Fill and print the results table: every recipe and bit width of one config; resumable, cached cell by cell.

Example: AHCQ_DATA=data python tools/results_table.py --fill --readme
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in ptq.py

from ahcq_plugin.mm.results import CELLS, fill, stages_table, table, update_readme


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mm_configs/sam_tiny_w4a4_yolox_nano_coco.py")
    parser.add_argument("--folder", type=Path, default=Path("docs/results"), help="where each cell's figures are kept")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/results"))
    parser.add_argument("--fill", action="store_true", help="run the cells that have no figures yet")
    parser.add_argument("--only", nargs="*", metavar="CELL", help="of these cells: " + " ".join(c.name for c in CELLS))
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    args = parser.parse_args()
    known = {cell.name: cell for cell in CELLS}
    unknown = sorted(set(args.only or ()) - set(known))
    if unknown:
        parser.error(f"unknown cell {', '.join(unknown)}; allowed: {', '.join(known)}")
    chosen = [known[name] for name in args.only] if args.only else CELLS
    failed = fill(args.config, args.folder, args.work_dir, chosen) if args.fill else []
    shown = next(cell for cell in CELLS if cell.name == "qdrop_w4a4")
    markdown = table(args.config, args.folder) + "\n\n" + stages_table(args.config, args.folder, shown)
    print(markdown)
    if args.readme:
        update_readme(Path("README.md"), markdown)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
