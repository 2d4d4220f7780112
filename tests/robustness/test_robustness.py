# SPDX-License-Identifier: Apache-2.0
"""Bad input is refused in one line, before expensive work, whatever it is and wherever it is given."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.robustness.calls import calls
from tests.robustness.cases import all_cases
from tests.robustness.kills import KILLS, flips, kills
from tests.robustness.kinds import FILES, damaged
from tests.robustness.materials import make_materials
from tests.robustness.outcomes import judge
from tests.robustness.trying import try_case
from tests.robustness.zygote import Ended, Zygote


@pytest.mark.parametrize(
    ("status", "signal", "cpu", "text", "outcome"),
    [
        (2, 0, 1.0, "loading\nerror: no such file\n", "refused"),
        (2, 0, 1.0, "usage: x.py\nx.py: error: argument --n: expected one argument\n", "refused"),
        (2, 0, 1.0, "libpng error: Read Error\nerror: x.png is not a readable image\n", "refused"),
        (2, 0, 99.0, "error: no such file\n", "late"),
        (2, 0, 1.0, "error: one\nerror: two\n", "unclear"),
        (1, 0, 1.0, "error: no such file\n", "unclear"),
        (1, 0, 1.0, "Traceback (most recent call last):\nKeyError: 'x'\n", "traceback"),
        (0, 0, 1.0, "written: x\n", "accepted"),
        (-1, 24, 60.0, "", "hang"),
        (-1, 11, 1.0, "", "crash"),
    ],
)
def test_outcomes_are_told_apart(status: int, signal: int, cpu: float, text: str, outcome: str) -> None:
    assert judge(Ended(status, signal, cpu, text))[0] == outcome


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_another(kind: str, tmp_path: Path) -> None:
    good, place = tmp_path / "x.bin", tmp_path / "copy"
    place.mkdir()
    good.write_bytes(bytes(range(1, 256)) * 9)
    path = damaged(good, place, FILES[kind])
    assert not path.is_file() or path.read_bytes() != good.read_bytes()


def test_every_call_of_the_python_api_has_a_name_of_its_own() -> None:
    names = [name for name, _ in calls()]
    assert len(names) == len(set(names)) > 500


@pytest.mark.slow
def test_every_kind_in_every_place(tmp_path: Path) -> None:
    """At least 300 cases; late refusals are allowed, and shown by ``python -m tests.robustness``."""
    with Zygote() as zygote:
        outcomes = [try_case(case, zygote) for case in all_cases(make_materials(tmp_path, zygote))]
    wrong = [(o.outcome, o.name, o.said) for o in outcomes if not o.right]
    assert not wrong and len(outcomes) >= 300, (Counter(o.outcome for o in outcomes), wrong[:20])


@pytest.mark.slow
def test_some_kills_and_some_flipped_bits(tmp_path: Path) -> None:
    """One kill of every job and a bit in every file; ``python -m tests.robustness.kills`` does 50 and 40."""
    with Zygote() as zygote:
        trials = [*flips(5, tmp_path, zygote), *kills(dict.fromkeys(KILLS, 1), tmp_path, zygote)]
    assert len(trials) == 5 + len(KILLS) and not [trial for trial in trials if trial.wrong]
