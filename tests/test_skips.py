# SPDX-License-Identifier: Apache-2.0
"""A skip whose reason is not on the list fails a run in CI, whoever runs the test, and only there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PASSES = "def test_passes():\n    pass\n"
SKIPS = "import pytest\n\ndef test_skips():\n    pytest.skip({!r})\n"
MODULE = "import pytest\n\npytest.importorskip('no_such_module')\n\ndef test_never():\n    pass\n"
EXPECTED_FAILURE = "import pytest\n\n@pytest.mark.xfail\ndef test_fails():\n    raise ValueError\n"
UNLISTED, LISTED = "no time today", "needs MQBench, see docs/mqbench.md: no module"


def run(folder: Path, source: str, ci: str, workers: int) -> subprocess.CompletedProcess:
    (folder / "conftest.py").write_text(
        "from tests.skips import register\n\n\ndef pytest_configure(config):\n    register(config)\n"
    )
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_passes.py").write_text(PASSES)
    (folder / "test_it.py").write_text(source)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CI": ci}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(workers), "--dist", "loadfile"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("source", "reason"), [(SKIPS.format(UNLISTED), UNLISTED), (MODULE, "could not import 'no_such_module'")]
)
def test_a_skip_that_is_not_listed_fails_the_run_and_is_named(tmp_path, source, reason, workers) -> None:
    done = run(tmp_path, source, "true", workers)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    message = done.stdout.partition("skips that fail this run")[2]
    assert reason in message and "test_it.py" in message and "tests/skips.py" in message


@pytest.mark.parametrize(
    ("source", "ci"),
    [(SKIPS.format(LISTED), "true"), (EXPECTED_FAILURE, "true"), (SKIPS.format(UNLISTED), ""), (MODULE, "false")],
)
def test_a_listed_skip_an_expected_failure_and_a_skip_at_home_pass(tmp_path, source, ci) -> None:
    done = run(tmp_path, source, ci, 0)
    assert done.returncode == pytest.ExitCode.OK and "fail this run" not in done.stdout, done.stdout


def test_ci_says_that_it_is_ci() -> None:
    assert "export CI=true" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
