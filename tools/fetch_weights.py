# SPDX-License-Identifier: Apache-2.0
"""Fetch the published weights that configs need into checkpoints/: resumed, verified, converted."""

import argparse
from pathlib import Path

from ahcq_plugin.support.tool import importing, run_tool

with importing("mm"):
    from ahcq_plugin.mm.weights import fetch, state_of, wanted
    from ahcq_plugin.support.arguments import writable_folder
    from ahcq_plugin.zoo.published import PUBLISHED_FILES

CONFIGS = Path(__file__).resolve().parents[1] / "mm_configs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"configs (*.py) or names; known: {', '.join(PUBLISHED_FILES)}")
    parser.add_argument(
        "--folder", type=writable_folder, default=Path("checkpoints"), help="default: %(default)s, as in configs"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--list", action="store_true", help="print files, sizes, checksums and URLs, and fetch nothing"
    )
    instead.add_argument("--check", action="store_true", help="compare the files that are there, and fetch nothing")
    args = parser.parse_args()
    failed = 0
    entries = wanted(args.names) if args.names else list(PUBLISHED_FILES.values())
    if not (args.names or args.list or args.check):
        parser.error(f"give configs or names ({', '.join(PUBLISHED_FILES)}), or --list or --check")
    for entry in entries:
        if args.list:
            size = "size unknown" if entry.size is None else f"{entry.size:,} bytes"
            sha256 = (
                f"SHA-256 {entry.sha256}{'' if len(entry.sha256) == 64 else '…'}" if entry.sha256 else "no checksum"
            )
            print(f"{entry.name}: {args.folder / entry.file}, {size}, {sha256}\n    {entry.url}")
        elif args.check:
            state = state_of(entry, args.folder)
            failed += state not in ("ok", "there")
            print(f"{entry.name}: {args.folder / entry.file}: {state}")
        else:
            print(fetch(entry, args.folder, CONFIGS))
    return 1 if failed else 0


if __name__ == "__main__":
    run_tool(main)
