# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ahcq_plugin.metrics.jf import boundary, boundary_accuracy, score_object, score_sequence
from ahcq_plugin.metrics.mask_iou import mask_iou


def square(y, x, side, size=40):
    mask = np.zeros((size, size), bool)
    mask[y : y + side, x : x + side] = True
    return mask


def test_region_similarity_by_hand():
    assert mask_iou(square(0, 0, 4), square(0, 2, 4)) == pytest.approx(8 / 24)
    assert mask_iou(square(0, 0, 0), square(0, 0, 0)) == 1
    assert mask_iou(square(0, 0, 0), square(0, 0, 3)) == 0


def test_boundary_by_hand():
    mask = np.zeros((5, 5), bool)
    mask[2, 2] = True
    assert np.argwhere(boundary(mask)).tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert not boundary(np.ones((5, 5), bool)).any()  # the picture's border is no boundary


def test_boundaries_match_within_the_radius_and_not_beyond():
    truth = square(10, 10, 15)
    # 40 pixels: diagonal 56.6, bound 0.008 -> radius 1
    assert boundary_accuracy(square(11, 10, 15), truth) == 1
    assert boundary_accuracy(square(12, 10, 15), truth) < 1
    assert boundary_accuracy(square(12, 10, 15), truth, bound=2 / 56) == 1


def test_empty_masks():
    empty, full = np.zeros((40, 40), bool), square(3, 3, 9)
    assert boundary_accuracy(empty, empty) == 1
    assert boundary_accuracy(empty, full) == boundary_accuracy(full, empty) == 0


def test_an_object_counts_from_its_first_frame_on_and_a_vanished_one_must_be_gone():
    empty, here = np.zeros((40, 40), bool), square(5, 5, 12)
    truth = np.stack([empty, here, empty])
    assert score_object(truth, truth).j == 1
    kept = score_object(np.stack([empty, here, here]), truth)  # two frames count: right, still there
    assert kept.j == kept.f == 0.5
    early = score_object(np.stack([here, here, empty]), truth)  # three frames count: too early, right, right
    assert early.j == pytest.approx(2 / 3)
    assert score_object(np.stack([here] * 3), np.stack([empty] * 3)) is None


def test_the_ends_do_not_count_and_overlaps_are_allowed():
    right, wrong = square(5, 5, 12), square(25, 25, 5)
    truth = np.stack([np.stack([right, right])] * 4)
    masks = truth.copy()
    masks[0], masks[-1] = wrong, wrong
    assert [(score.j, score.f) for score in score_sequence(masks, truth)] == [(1, 1), (1, 1)]
    assert score_sequence(masks, truth, skip_ends=False)[0].j == 0.5
    with pytest.raises(ValueError, match="no annotated frame is left"):
        score_sequence(masks[:2], truth[:2])


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_label_maps_score_as_in_the_public_benchmark(seed):
    evaluator = pytest.importorskip("vos_benchmark.evaluator", reason="needs the vos-benchmark package")
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(5, 90, 2))

    def label_maps():
        maps = np.zeros((5, *shape), np.uint8)
        for frame in maps:
            for n in rng.permutation(3)[: rng.integers(0, 4)]:
                y, x = rng.integers(0, shape[0]), rng.integers(0, shape[1])
                frame[y : y + rng.integers(1, 40), x : x + rng.integers(1, 40)] = n + 1
        return maps

    truth = label_maps()
    masks = truth.copy() if seed % 3 == 0 else np.roll(truth, 2, 2) if seed % 3 == 1 else label_maps()
    theirs = evaluator.Evaluator()
    for mask, gt in zip(masks[1:-1], truth[1:-1], strict=True):
        theirs.feed_frame(mask, gt)
    j, f = theirs.conclude()
    split = [np.stack([maps == n for n in (1, 2, 3)], 1) for maps in (masks, truth)]
    ours = {n: score for n, score in enumerate(score_sequence(*split), 1) if score is not None}
    assert set(ours) == set(j)
    for n, score in ours.items():
        assert 100 * score.j == pytest.approx(j[n], abs=1e-6) and 100 * score.f == pytest.approx(f[n], abs=1e-6)
