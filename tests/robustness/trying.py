# SPDX-License-Identifier: Apache-2.0
"""Try one case."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.robustness.case import Case
from tests.robustness.outcomes import Outcome, judge
from tests.robustness.zygote import Zygote


def try_case(case: Case, zygote: Zygote) -> Outcome:
    """Run it in a folder of its own; a payload that ran is a crash, whatever the tool said."""
    with tempfile.TemporaryDirectory() as name:
        limit = 600 if case.control else 60  # a good run may take minutes
        ended = zygote.run(case.tool, case.prepare(Path(name)), Path(name), limit, setup=case.setup)
        ran = (Path(name) / "payload_ran").exists()
    outcome, said = ("crash", "the payload ran") if ran else judge(ended)
    return Outcome(case.group, case.full_name, case.control, outcome, said, ended.cpu)
