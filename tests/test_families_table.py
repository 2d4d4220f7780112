# SPDX-License-Identifier: Apache-2.0
"""docs/models.md is made of results as they are: what failed and what is not installed is named, no machine's paths."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from ahcq_plugin.support.files import write_json
from tests.families.measure import Result
from tests.families.table import page, read


def test_failures_and_missing_packages_are_named_without_the_folders_of_a_machine(tmp_path):
    good = Result(
        "timm",
        "ViT",
        {"torch": "2.5.1", "timm": "1.0"},
        units=2,
        coverage={"integers": 0.5, "outside units": 0.4},
        outside=["head", "pos", "norm", "cls"],
        off=0.0,
        w8a8=0.01,
        w4a4=0.3,
        keys_kept=True,
        reloads=True,
        matmuls=12,
        onnx=1,
        units_of_a_kind=1,
    )
    message = "UnitError: does not trace at /x/y/site-packages/timm/models/swin.py:3: `a | b`"
    bad = Result("timm", "Swin", {"torch": "2.5.1", "timm": "1.0"}, problems={"off": message, "W8A8": message})
    absent = Result("sam2", "SAM 2.1 with video", {}, installed="No module named 'sam2'")
    for number, result in enumerate((bad, good, absent)):
        write_json(asdict(result), tmp_path / "0" / f"{number}.json")
    # another environment, where one of them is installed and the others are not
    write_json(asdict(Result("timm", "ViT", {}, installed="No module named 'timm'")), tmp_path / "1" / "x.json")
    results = read(tmp_path)
    assert [r.name for r in results] == ["SAM 2.1 with video", "ViT", "Swin"]
    assert [r.fails for r in results] == [False, False, True] and good.passes and not absent.passes
    text = page(results)
    assert "| ViT | timm | torch 2.5.1, timm 1.0 | 2 | 50% | 40%: `head`, `pos`, `norm` and 1 more | 0 |" in text
    assert "more | 0 | 1.0% | 30.0% | yes | 12 | 1 of 1 |" in text
    assert "- timm 1.0: Swin: off, W8A8: UnitError: does not trace at timm/models/swin.py:3: `a \\| b`" in text
    assert "- sam2: SAM 2.1 with video: No module named 'sam2'" in text and "/x/y/" not in text


def test_an_error_above_the_goal_or_another_bit_does_not_pass():
    def result(**changes) -> Result:
        values = dict(off=0.0, w8a8=0.01, keys_kept=True, reloads=True)
        return Result("timm", "ViT", {}, **(values | changes))

    assert result().passes and result(off=1e-6, fused=True).passes
    for change in (
        {"off": 1e-3, "fused": True},
        {"off": 1e-6},
        {"w8a8": 0.06},
        {"w8a8": None},
        {"keys_kept": False},
        {"reloads": None},
    ):
        assert result(**change).fails, change


def test_what_is_off_too_much_is_shown_beside_seven_bits():
    """Rounding doubles with a bit less; a wrong operation stays."""
    text = page([Result("timm", "ViT", {}, off=1e-6, w8a8=0.1, w7a7=0.21)])
    assert "- timm: ViT: W8A8: 10.0% (21.0% with 7 bits)\n" in text
    assert "- timm: ViT: off: other bits, without fused attention" in text
    assert "| 1e-06 (fused) |" in page([Result("timm", "ViT", {}, off=1e-6, fused=True)])


@pytest.mark.parametrize(
    ("noise", "unclipped", "cause"),
    [
        (0.09, 0.04, "by rounding: what 8 bits do to this model"),
        (0.03, 0.04, "by clipping: within the goal where ranges hold all values"),
        (0.07, 0.06, "by rounding and clipping together"),
        (0.03, 0.09, "explained by neither rounding nor clipping"),
    ],
)
def test_the_controls_name_the_cause_of_an_error(noise, unclipped, cause):
    text = page([Result("timm", "ViT", {}, off=0.0, w8a8=0.1, noise=noise, unclipped=unclipped)])
    figures = f"{noise:.1%} with noise in place of rounding; {unclipped:.1%} with ranges that hold all values"
    assert f"- timm: ViT: W8A8: 10.0%, {cause} ({figures})\n" in text
