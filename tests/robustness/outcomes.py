# SPDX-License-Identifier: Apache-2.0
"""What became of a case, and the table of all of them."""

from __future__ import annotations

import re
import signal
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tests.robustness.zygote import ROOT, Ended

#: Seconds of the processor after which a refusal comes late: reading a config and its imports takes one or two.
LATE = 10
OUTCOMES = ("refused", "late", "traceback", "accepted", "hang", "crash", "unclear")


@dataclass(frozen=True)
class Outcome:
    """A case and its outcome.

    Attributes:
        group: the column of the table, what takes the input.
        name: kind and place.
        outcome: one of ``OUTCOMES``; ``accepted`` also of a control, which has good input.
        said: the line of the error, or the end of what was printed.
        commit: of the code that was tried, short; empty where that is not known.
    """

    group: str
    name: str
    control: bool
    outcome: str
    said: str
    cpu: float
    commit: str = ""

    @property
    def right(self) -> bool:
        """A control ran, bad input was refused; late refusals count as right here and are listed."""
        return self.outcome == "accepted" if self.control else self.outcome in ("refused", "late")


def commit() -> str:
    """Of the checkout, short; empty where there is none."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def judge(ended: Ended) -> tuple[str, str]:
    """(outcome, what was said)."""
    lines = [line.strip() for line in ended.text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\S+: )?error: ", line)]  # libraries may say more
    said = (errors or lines or ["nothing"])[-1][:300]
    if ended.signal in (signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM):
        return "hang", said
    if ended.signal:
        return "crash", f"signal {ended.signal}: {said}"
    if "Traceback" in ended.text:
        return "traceback", lines[-1][:300] if "please report" not in lines[-1] else lines[-2][:300]
    if ended.status == 0:
        return "accepted", lines[-1][:300] if lines else ""
    if ended.status == 2 and len(errors) == 1:
        return ("late" if ended.cpu > LATE else "refused"), said
    return "unclear", f"status {ended.status}, {len(errors)} lines with an error: {said}"


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: a row for each group."""
    bad = [o for o in outcomes if not o.control]
    lines = [f"| input | cases | {' | '.join(OUTCOMES)} |", "|---|" + "---|" * (len(OUTCOMES) + 1)]
    for group in [*dict.fromkeys(o.group for o in bad), None]:
        chosen = [o for o in bad if group in (None, o.group)]
        counts = Counter(o.outcome for o in chosen)
        lines.append(f"| {group or '**all**'} | {len(chosen)} | {' | '.join(str(counts[o]) for o in OUTCOMES)} |")
    return "\n".join(lines)
