# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch

from ahcq_plugin.studies.equalization import equalize
from ahcq_plugin.studies.hardness import bimodal_attentions, bimodality, statistics
from ahcq_plugin.zoo.hard import SAM_TINY_HARD, harden
from ahcq_plugin.zoo.sam import box_forward
from tests.conftest import make_tiny_items, make_tiny_sam


@pytest.fixture(scope="module")
def double_sam():
    sam = make_tiny_sam().double()
    sam.prompt_encoder.float()
    return sam


@pytest.fixture(scope="module")
def items():
    return [{**item, "image": item["image"].double()} for item in make_tiny_items()]


def test_equalization_undoes_what_is_planted_and_keeps_the_masks(double_sam, items) -> None:
    twin = harden(copy.deepcopy(double_sam), SAM_TINY_HARD)
    planted = statistics(twin, items, box_forward)
    assert bimodal_attentions(twin, items[0], box_forward)
    equalize(twin, items, box_forward)
    with torch.no_grad():
        for item in items:
            torch.testing.assert_close(box_forward(twin, item), box_forward(double_sam, item), rtol=1e-6, atol=1e-9)
    before, after = (statistics(sam, items, box_forward) for sam in (double_sam, twin))
    folded = [name for name in before if name.startswith("channel ratio")] + ["bimodality of keys"]
    for name in folded:
        assert after[name].median < max(0.6 * planted[name].median, before[name].median), name
    assert after["channel ratio, encoder"].largest < 2
    assert not bimodal_attentions(twin, items[0], box_forward)


def test_tails_after_gelu_are_not_undone(double_sam, items) -> None:
    """Three units for one cannot be folded: that challenge is the quantizers'."""
    twin = harden(copy.deepcopy(double_sam), SAM_TINY_HARD.only("tails"))
    encoder = "image_encoder.blocks.0.mlp.lin2"
    equalize(twin, items, box_forward)
    assert twin.get_submodule(encoder).in_features == double_sam.get_submodule(encoder).in_features + 2


def test_a_second_equalization_changes_little(double_sam, items) -> None:
    once = equalize(copy.deepcopy(double_sam), items, box_forward)
    twice = equalize(copy.deepcopy(once), items, box_forward)
    for (name, a), b in zip(once.state_dict().items(), twice.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)


def test_bimodality_of_known_distributions() -> None:
    line = torch.linspace(-1, 1, 100_001)
    assert bimodality(line) == pytest.approx(5 / 9, rel=1e-3)
    assert bimodality(torch.tensor([-1.0, 1.0] * 50)) == pytest.approx(1)
    normal = torch.distributions.Normal(0, 1).icdf((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    assert bimodality(3 + 2 * normal) == pytest.approx(1 / 3, rel=1e-2)
    assert bimodality(torch.ones(5)) == 0
