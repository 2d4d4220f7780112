# SPDX-License-Identifier: Apache-2.0
"""Try all cases and print the table: ``python -m tests.robustness [--groups recipe spec] [--out FILE.json]``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.robustness.cases import all_cases
from tests.robustness.materials import make_materials
from tests.robustness.outcomes import Outcome, table
from tests.robustness.trying import try_case
from tests.robustness.zygote import Zygote


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", nargs="+")
    parser.add_argument("--match", default="", help="only cases with this in their name")
    parser.add_argument("--out", type=Path, help="all outcomes as JSON")
    args = parser.parse_args()
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory() as name, Zygote() as zygote:
        good = make_materials(Path(name), zygote)
        for case in all_cases(good):
            if (args.groups is None or case.group in args.groups) and args.match in f"{case.tool} {case.name}":
                found.append(last := try_case(case, zygote))
                if not last.right or last.outcome == "late":
                    sys.stdout.write(f"{last.outcome:9} {last.group} | {last.name} | {last.said}\n")
                    sys.stdout.flush()
    controls = [outcome for outcome in found if outcome.control]
    sys.stdout.write(f"\n{table(found)}\n\ncontrols that ran: {sum(o.right for o in controls)} of {len(controls)}\n")
    if args.out:
        args.out.write_text(json.dumps([asdict(o) for o in found], indent=1))
    return 0 if all(outcome.right for outcome in found) else 1


if __name__ == "__main__":
    sys.exit(main())
