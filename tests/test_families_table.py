# SPDX-License-Identifier: Apache-2.0
"""docs/models.md is made of results as they are: what failed and what is not installed is named, no machine's paths."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from ahcq_plugin.support.files import write_json
from tests.families.choices import Choices
from tests.families.controls import ATTENTION, CHOICES, NOISE, RANGES
from tests.families.measure import Result
from tests.families.table import FIGURES, page, read


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


def test_what_is_off_is_shown():
    text = page([Result("timm", "ViT", {}, off=1e-6, w8a8=0.1)])
    assert "- timm: ViT: W8A8: 10.0%\n" in text
    assert "- timm: ViT: off: other bits, without fused attention" in text
    assert "| 1e-06 (fused) |" in page([Result("timm", "ViT", {}, off=1e-6, fused=True)])


@pytest.mark.parametrize(
    ("errors", "cause"),
    [
        ((0.04, 0.04, 0.04, 0.03), "other decisions"),
        ((0.10, 0.04, 0.04, 0.03), "attention weights on an even grid"),
        ((0.10, 0.10, 0.04, 0.03), "clipping"),
        ((0.09, 0.08, 0.04, 0.03), "clipping"),
        ((0.07, 0.07, 0.04, 0.03), "other decisions and clipping"),
        ((0.10, 0.10, 0.09, 0.08), "rounding: what 8 bits do to this model"),
        ((0.07, 0.07, 0.06, 0.06), "other decisions and rounding: what 8 bits do to this model"),
        ((0.10, 0.10, 0.09, 0.03), "what no control explains"),
        ((0.09, 0.08, 0.05, 0.08), "clipping"),
        ((0.09, 0.08, 0.07, 0.09), "rounding: what 8 bits do to this model"),
    ],
)
def test_the_controls_name_the_cause_of_an_error(errors, cause):
    names = (CHOICES, ATTENTION, RANGES, NOISE)
    text = page([Result("timm", "ViT", {}, off=0.0, w8a8=0.1, controls=dict(zip(names, errors, strict=True)))])
    figures = "; ".join(f"{e:.1%} {FIGURES[name]}" for name, e in zip(names, errors, strict=True))
    assert f"- timm: ViT: W8A8: 10.0%, {cause} ({figures})\n" in text


def decide(masks, scores):
    """The masks with the best score, the largest pixels and where they are, and which pixels are positive."""
    best = masks[torch.argmax(scores)]
    pixels, where = masks.max(dim=1)
    second, places = scores.topk(2)
    return best, pixels, where, second, places, masks > 0, scores.sort(descending=True).values


def test_decisions_of_the_first_run_are_taken_again_with_the_numbers_of_the_second():
    masks, scores = torch.tensor([[1.0, -2.0], [-3.0, 4.0], [5.0, 0.5]]), torch.tensor([0.1, 0.7, 0.3])
    choices = Choices()
    with choices:
        first = decide(masks, scores)
    assert all(torch.equal(a, b) for a, b in zip(first, decide(masks, scores), strict=True))
    for _ in range(2):
        with choices:
            best, pixels, where, second, places, positive, ordered = decide(-masks, 1 - scores)
        assert torch.equal(best, -masks[1])
        assert torch.equal(where, first[2]) and torch.equal(pixels, -first[1])
        assert torch.equal(places, torch.tensor([1, 2])) and torch.equal(second, 1 - scores[[1, 2]])
        assert torch.equal(positive, masks > 0) and torch.equal(ordered, 1 - scores[[1, 2, 0]])
    with choices:
        other = decide(-masks[:2], 1 - scores[:2])
    assert torch.equal(other[5], masks[:2] < 0), "another shape is decided anew"
