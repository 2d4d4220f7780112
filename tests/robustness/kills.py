# SPDX-License-Identifier: Apache-2.0
"""Kill tools at random moments and flip bits in what they read: ``python -m tests.robustness.kills``.

A killed run that goes on gives, bit for bit, what one gives that was never disturbed; what a tool that writes at once
leaves is absent, as before, or whole. A flipped bit is found: the file is refused, or what it held is computed again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tests.robustness.jobs import Job, flipped_files, jobs
from tests.robustness.kinds import flip
from tests.robustness.outcomes import commit, judge
from tests.robustness.zygote import Zygote

#: Kills of every job: 50.
KILLS = {"ptq": 18, "video ptq": 10, "export": 8, "make_hls": 6, "results": 8}
FLIPS = 40


@dataclass(frozen=True)
class Trial:
    """One kill or one flipped bit. ``wrong`` says what is not as it should be, '' where nothing is; ``commit`` is of
    the code."""

    kind: str
    what: str
    detail: str
    wrong: str
    commit: str = ""


def kill(job: Job, undisturbed: dict[str, str], seconds: float, folder: Path, zygote: Zygote, seed: int) -> Trial:
    """Start ``job`` in ``folder``, kill it at a random moment of ``seconds``, look, and let it go on to its end."""
    chance = random.Random(f"{job.name} {seed}")
    job.before(folder)
    moment = chance.uniform(0.0, seconds)
    killed = zygote.run(job.tool, job.argv(folder), folder, 600, kill_after=moment)
    detail, wrong = f"after {moment:.2f} of {seconds:.2f} s", ""
    try:
        left = job.look(folder)
    except (ValueError, OSError) as error:
        wrong = f"what the killed run left cannot be read: {error}"
    if not wrong and left not in (*job.allowed, undisturbed):
        wrong = "what the killed run left is neither what was there nor the whole result"
    if killed.status == 0:
        detail += ", had ended"
    ended = zygote.run(job.tool, job.argv(folder), folder, 600)
    if ended.status:
        wrong = f"did not go on: {judge(ended)}"
    elif not wrong and job.result(folder) != undisturbed:
        wrong = "another result than that of an undisturbed run"
    elif not wrong and (litter := [str(path.relative_to(folder)) for path in job.litter(folder)]):
        wrong = f"left behind: {litter[:3]}"
    return Trial("kill", job.name, detail, wrong)


def kills(counts: dict[str, int], folder: Path, zygote: Zygote) -> Iterator[Trial]:
    """All kills; each job runs undisturbed first."""
    for job in jobs(folder, zygote):
        if not counts.get(job.name):
            continue
        place = folder / f"{job.name}-whole"
        place.mkdir()
        job.before(place)
        ended = zygote.run(job.tool, job.argv(place), place, 600)
        assert ended.status == 0, ended.text
        undisturbed = job.result(place)
        for seed in range(counts[job.name]):
            with tempfile.TemporaryDirectory(dir=folder) as name:
                yield kill(job, undisturbed, ended.seconds, Path(name), zygote, seed)


def flips(count: int, folder: Path, zygote: Zygote) -> Iterator[Trial]:
    """Flip one bit each anywhere in files that a resume, ``export`` or ``sam.checkpoint`` reads."""
    targets = flipped_files(folder, zygote)
    for seed in range(count):
        target = targets[seed % len(targets)]
        with tempfile.TemporaryDirectory(dir=folder) as name:
            place = Path(name)
            path = target.prepare(place, random.Random(f"which {seed}"))
            where = flip(path, random.Random(f"bit {seed}"))
            ended = zygote.run(target.tool, target.argv(place), place, 600)
            outcome, said = judge(ended)
            found = outcome in ("refused", "late") or (outcome == "accepted" and target.recomputed(ended, place))
            detail = f"{path.name}, {where}"
            yield Trial("flip", target.name, detail, "" if found else f"{outcome}: {said}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kept", type=Path, help="trials, a line each, added")
    parser.add_argument("--share", type=float, default=1.0, help="of all trials")
    parser.add_argument("--jobs", nargs="*", default=[*KILLS], choices=KILLS, help="to kill; default: all")
    parser.add_argument("--flips", type=int, default=FLIPS, help="bits")
    args = parser.parse_args()
    counts = {name: round(count * args.share) for name, count in KILLS.items() if name in args.jobs}
    wrong, code = 0, commit()
    with tempfile.TemporaryDirectory() as name, Zygote() as zygote:
        trials: Callable[[], Iterator[Trial]]
        for trials in (
            lambda: flips(round(args.flips * args.share), Path(name), zygote),
            lambda: kills(counts, Path(name), zygote),
        ):
            for trial in (replace(trial, commit=code) for trial in trials()):
                wrong += bool(trial.wrong)
                sys.stdout.write(f"{trial.kind} {trial.what} | {trial.detail} | {trial.wrong or 'right'}\n")
                sys.stdout.flush()
                if args.kept:
                    with args.kept.open("a") as file:
                        file.write(json.dumps(asdict(trial)) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
