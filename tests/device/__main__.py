# SPDX-License-Identifier: Apache-2.0
"""Waits and copies between host and device of ``quantize()`` on the small SAM, by place: ``python -m tests.device``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from tests.device.strict import counting, load
from tests.device.test_package import RECIPES, quantized

ITERATIONS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--places", type=int, default=8, help="of each recipe")
    args = parser.parse_args()
    load()
    for recipe in args.recipes:
        with counting() as events:
            quantized(recipe, "strict", iterations=ITERATIONS)
        lines = [f"{recipe}: {events['wait']} waits, {events['to device']} copies to the device"]
        files: Counter[tuple[str, str]] = Counter()
        for (event, place), count in events.places.items():
            files[event, place.partition(":")[0]] += count
        for (event, file), count in files.most_common(args.places):
            lines.append(f"  {count:6} {event:9} {file}")
        sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
