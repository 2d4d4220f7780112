# SPDX-License-Identifier: Apache-2.0
"""How tools end: what a user can mend is one line and status 2, a defect is a traceback and status 1."""

import ast
import sys
from pathlib import Path

import pytest
import torch

from ahcq_plugin.ptq import AuditError, Recipe
from ahcq_plugin.ptq.audit import AuditReport
from ahcq_plugin.support.safe_load import safe_load
from ahcq_plugin.support.tool import importing, run_tool

TOOLS = sorted((Path(__file__).resolve().parents[2] / "tools").glob("*.py"))


def ended(main, capsys) -> tuple[int, str]:
    """(status, what stands on stderr) of a tool with this ``main``."""
    with pytest.raises(SystemExit) as end:
        run_tool(main)
    return end.value.code, capsys.readouterr().err


def wrong_recipe() -> None:
    Recipe.from_config("rtn", w_bits=99)


def missing_file() -> None:
    safe_load("nowhere.pth")


def error_inside_a_library() -> None:
    torch.zeros(2) @ torch.zeros(3)


def error_without_words_of_ours() -> None:
    int("x")


def part_of_ours_that_is_missing() -> None:
    import ahcq_plugin.no_such_part  # noqa: F401


def package_that_is_not_installed() -> None:
    import no_such_package  # noqa: F401


def interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("main", [wrong_recipe, missing_file, package_that_is_not_installed])
def test_what_a_user_can_mend_is_one_line(main, capsys) -> None:
    status, text = ended(main, capsys)
    assert status == 2 and text.startswith("error: ") and text.count("\n") == 1


@pytest.mark.parametrize("main", [error_inside_a_library, error_without_words_of_ours, part_of_ours_that_is_missing])
def test_a_defect_is_a_traceback_and_asks_for_a_report(main, capsys) -> None:
    status, text = ended(main, capsys)
    assert status == 1 and "Traceback" in text and "please report" in text


def test_statuses_are_kept(capsys) -> None:
    assert [ended(lambda code=code: code, capsys) for code in (None, 0, 1, 7)] == [(0, ""), (0, ""), (1, ""), (7, "")]
    assert ended(interrupted, capsys) == (130, "interrupted\n")


def test_a_failed_audit_is_told_in_full_and_is_no_bad_input(capsys) -> None:
    def main() -> None:
        raise AuditError(AuditReport(["first problem", "second problem"]))

    status, text = ended(main, capsys)
    assert status == 1 and "first problem\n" in text and "second problem" in text and "Traceback" not in text


@pytest.mark.parametrize("path", [p for p in TOOLS if p.name != "build_mmcv.py"], ids=lambda p: p.stem)
def test_every_tool_ends_so(path: Path) -> None:
    """But build_mmcv.py, which runs before the package is there."""
    last = ast.parse(path.read_text(encoding="utf-8")).body[-1]
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"
    (call,) = last.body
    assert isinstance(call.value, ast.Call) and call.value.func.id == "run_tool"


def test_a_package_that_is_missing_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mmdet", None)
    with pytest.raises(SystemExit) as ended, importing("mm"):
        import mmdet  # noqa: F401
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert "`pip install 'ahcq_plugin[mm]'`" in said
    with pytest.raises(ModuleNotFoundError), importing("mm"):
        import ahcq_plugin.no_such_part  # noqa: F401
