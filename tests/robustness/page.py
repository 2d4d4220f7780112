# SPDX-License-Identifier: Apache-2.0
"""docs/robustness.md, from what was found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ahcq_plugin.support.files import write_text
from tests.robustness.outcomes import LATE, OUTCOMES, Outcome, table
from tests.robustness.zygote import ROOT

PAGE = ROOT / "docs" / "robustness.md"

_SO_FAR = "Not all cases have been tried, and some at an earlier state of the code: this is what is known so far."
_KILLS = """\
SIGKILL at a random moment of a run (uniform, seeded), then the same command again. Right is: what lies in the
folder after the kill can be read, or is what was there before; the second call ends with the result of a run that
nobody disturbed, bit for bit (times aside), and leaves no temporary files."""
_FLIPS = """\
One bit anywhere in a file that the next call reads. Right is: the file is refused, or what it held is computed
again, with the same result."""
_TEXT = """# Bad input, kills, flipped bits

What happens when a setting, a file or a machine is wrong, tried in every place by a script rather than one by one.
This page is written by `python -m tests.robustness --write`, with the kills and flipped bits that `python -m
tests.robustness.kills` noted.

## Bad input

{cases:,} bad inputs, each in a process of its own; the input of {controls} controls is good, and {ran} of them ran.
Right is: one line that begins with `error:`, and exit status 2.

{table}

- **late**: refused in one line, but after more than {late} s of the processor. **traceback**: an error that nobody
  foresaw. **accepted**: ended as if all were well. **hang**: killed after 60 s of the processor. **crash**: ended
  by a signal, or code planted in the file ran. **unclear**: another status, or more than one line of errors.
- Kinds: settings of a wrong type, sign or size, not a number, infinite; names of nothing; files that are missing,
  empty, folders, noise, text, zeros, cut off, links to themselves, pipes, with a bit flipped, with a pickle that
  runs code; annotations that lie; folders that cannot be written; files that are whole, with a digest that is right,
  and hold what cannot be; keys that stand twice; images of other formats and sizes; options that are none, or do not
  go together; what is written in the place of what is read; calls of the Python API with arguments of another kind,
  items that do not go through the model, weights that layers share; a machine without room for files or for what is
  printed, names that are not UTF-8.

{commits}

By tool:

{tools}

{late_ones}
{so_far}
## Kills

{kills}

## Flipped bits

{flips}
"""


def write_page(found: Sequence[Outcome], trials: Path | None, through: bool = True) -> None:
    """Write the page from outcomes of all cases (else not ``through``), and the trials of ``kills.py``, a line each."""
    bad = [outcome for outcome in found if not outcome.control]
    controls = [outcome for outcome in found if outcome.control]
    rows = [json.loads(line) for line in trials.read_text().splitlines()] if trials else []
    late = [f"- {outcome.name}: {outcome.said} ({outcome.cpu:.0f} s)" for outcome in bad if outcome.outcome == "late"]
    text = _TEXT.format(
        cases=len(bad),
        controls=len(controls),
        ran=sum(outcome.right for outcome in controls),
        table=table(found),
        late=LATE,
        tools=_tools(bad),
        commits=_commits([outcome.commit for outcome in found]),
        so_far="" if through else f"\n{_SO_FAR}\n",
        late_ones="\n".join(["Late:\n", *late]) if late else f"None was late; the slowest took {_slowest(bad)}.",
        kills=_of_trials([row for row in rows if row["kind"] == "kill"], _KILLS, "killed"),
        flips=_of_trials([row for row in rows if row["kind"] == "flip"], _FLIPS, "file"),
    )
    write_text(text, PAGE)


def _tools(bad: Sequence[Outcome]) -> str:
    lines = ["| tool | cases | refused | other |", "|---|---|---|---|"]
    for tool in sorted({outcome.name.split()[0] for outcome in bad}):
        counts = Counter(outcome.outcome for outcome in bad if outcome.name.split()[0] == tool)
        others = ", ".join(f"{counts[name]} {name}" for name in OUTCOMES[1:] if counts[name])
        lines.append(f"| `{tool}` | {sum(counts.values())} | {counts['refused']} | {others or '–'} |")
    return "\n".join(lines)


def _commits(commits: Sequence[str]) -> str:
    """A line that says of which code; commits in the order in which they were tried first."""
    counts = Counter(commits)
    return (
        "Tried at: " + ", ".join(f"{name or 'an earlier commit'} ({count:,})" for name, count in counts.items()) + "."
    )


def _slowest(bad: Sequence[Outcome]) -> str:
    slowest = max(bad, key=lambda outcome: outcome.cpu)
    return f"{slowest.cpu:.1f} s of the processor (imports aside): `{slowest.name}`"


def _of_trials(rows: Sequence[dict[str, str]], text: str, title: str) -> str:
    if not rows:
        return f"{text}\n\nNot tried yet."
    lines = [
        text,
        "",
        _commits([row.get("commit", "") for row in rows]),
        "",
        f"| {title} | times | right |",
        "|---|---|---|",
    ]
    for what in dict.fromkeys(row["what"] for row in rows):
        chosen = [row for row in rows if row["what"] == what]
        lines.append(f"| {what} | {len(chosen)} | {sum(not row['wrong'] for row in chosen)} |")
    lines.append(f"| **all** | {len(rows)} | {sum(not row['wrong'] for row in rows)} |")
    wrong = [f"- {row['what']}, {row['detail']}: {row['wrong']}" for row in rows if row["wrong"]]
    return "\n".join([*lines, *(["", *wrong] if wrong else [])])
