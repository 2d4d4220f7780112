# SPDX-License-Identifier: Apache-2.0
"""The command line that trainings have in common."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, TypeVar

from ahcq_plugin.studies.training.run import Schedule
from ahcq_plugin.support.arguments import (
    at_least_one,
    at_least_zero,
    positive,
    usable_device,
    worker_count,
    writable_folder,
)

S = TypeVar("S", bound=Schedule)
_OF_SCHEDULE = {"steps": at_least_one, "batch": at_least_one, "lr": positive, "seed": at_least_zero}


def add_training_arguments(parser: argparse.ArgumentParser, defaults: Schedule, made: str) -> None:
    """Add where a run lives and computes, and its schedule.

    Args:
        made: what workers make, for the help.
    """
    parser.add_argument("--out", type=writable_folder, required=True, help="folder for state.pth and model.pth")
    parser.add_argument("--workers", type=worker_count, default=0, help=f"processes that make {made} (with a GPU)")
    parser.add_argument("--device", type=usable_device, default="cpu")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pth")
    for name, kind in _OF_SCHEDULE.items():
        parser.add_argument(f"--{name}", type=kind, default=getattr(defaults, name))


def scheduled(defaults: S, args: argparse.Namespace, **more: Any) -> S:
    """``defaults`` with the schedule that the command line gives, and ``more`` fields."""
    return dataclasses.replace(defaults, **{name: getattr(args, name) for name in _OF_SCHEDULE}, **more)
