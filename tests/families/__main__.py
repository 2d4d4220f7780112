# SPDX-License-Identifier: Apache-2.0
"""`make test-families`: measure every family in every given environment, test the loaders, write docs/models.md.

A family is measured where its package imports; PYTHONS names the interpreters of further environments. Results stay in
work_dirs/families, one file a family and environment; `--only` measures some again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from ahcq_plugin.support.files import write_text
from tests.families.measure import FAMILIES
from tests.families.table import page, read

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "work_dirs" / "families"


def main() -> int:
    """0 when everything that is installed somewhere passes, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pythons", nargs="*", default=[], help="interpreters of environments; default: this one")
    parser.add_argument("--only", nargs="*", help="sources, or source:name, as docs/models.md has them")
    parser.add_argument("--table", action="store_true", help="measure nothing, write docs/models.md of what there is")
    args = parser.parse_args()
    failed = []
    for number, python in enumerate(args.pythons or [sys.executable]):
        if args.table:
            break
        folder = RESULTS / str(number)
        # a process each: packages replace each other's registered models
        for source in args.only or dict.fromkeys(source for source, _ in FAMILIES):
            command = [python, "-m", "tests.families.measure", str(folder), source]
            if subprocess.run(command, cwd=ROOT).returncode:
                failed.append(f"{source}: the process ended badly in {python}")
        if subprocess.run([python, "-m", "pytest", "-q", "tests/families/loaders.py"], cwd=ROOT).returncode:
            failed.append(f"tests/families/loaders.py in {python}")
    results = read(RESULTS)
    write_text(page(results), ROOT / "docs" / "models.md")
    failed += [f"{r.source}: {r.name}: {r.problems or 'see docs/models.md'}" for r in results if r.fails]
    sys.stdout.write("".join(f"{line}\n" for line in failed) + f"{len(results)} results: docs/models.md\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
