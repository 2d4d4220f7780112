# SPDX-License-Identifier: Apache-2.0
"""Try all cases, and write docs/robustness.md: ``python -m tests.robustness [--kept FILE] [--write]``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from tests.robustness.cases import all_cases
from tests.robustness.materials import make_materials
from tests.robustness.outcomes import Outcome, commit, table
from tests.robustness.page import write_page
from tests.robustness.trying import try_case
from tests.robustness.zygote import Zygote


def kept(path: Path | None) -> dict[tuple[str, str], Outcome]:
    """What an earlier call found, by group and name; of two outcomes of a case the later one."""
    if path is None or not path.exists():
        return {}
    found = (Outcome(**json.loads(line)) for line in path.read_text().splitlines())
    return {(outcome.group, outcome.name): outcome for outcome in found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", nargs="+")
    parser.add_argument("--match", default="", help="only cases with this in their name")
    parser.add_argument(
        "--kept", type=Path, help="outcomes, a line each; cases that were right there are not tried again"
    )
    parser.add_argument("--write", action="store_true", help="write docs/robustness.md")
    parser.add_argument("--trials", type=Path, help="for the page: what tests.robustness.kills kept")
    parser.add_argument("--so-far", action="store_true", help="try nothing, write the page of what is in --kept")
    args = parser.parse_args()
    if args.so_far:
        write_page(list(kept(args.kept).values()), args.trials, through=False)
        return 0
    before, found, code = kept(args.kept), list[Outcome](), commit()
    with tempfile.TemporaryDirectory() as name, Zygote() as zygote:
        good = make_materials(Path(name), zygote)
        for case in all_cases(good):
            if (args.groups is not None and case.group not in args.groups) or args.match not in case.full_name:
                continue
            last = before.get((case.group, case.full_name))
            if last is None or not last.right:
                last = replace(try_case(case, zygote), commit=code)
                if args.kept:
                    with args.kept.open("a") as file:
                        file.write(json.dumps(asdict(last)) + "\n")
            found.append(last)
            if not last.right or last.outcome == "late":
                sys.stdout.write(f"{last.outcome:9} {last.group} | {last.name} | {last.said}\n")
                sys.stdout.flush()
    controls = [outcome for outcome in found if outcome.control]
    sys.stdout.write(f"\n{table(found)}\n\ncontrols that ran: {sum(o.right for o in controls)} of {len(controls)}\n")
    if args.write:
        write_page(found, args.trials)
    return 0 if all(outcome.right for outcome in found) else 1


if __name__ == "__main__":
    sys.exit(main())
