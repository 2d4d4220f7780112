# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from mmdet.registry import METRICS
from PIL import Image

import ahcq_plugin.mm  # noqa: F401  registers
from ahcq_plugin.mm.evaluation.jf_metric import JFMetric
from ahcq_plugin.zoo.videos import read_videos, write_clips


def shifted(video, pixels):
    """Truth of all annotated frames, and the same moved to the right: (T, N, H, W) each."""
    truth = np.stack([video.masks(t) for t in video.annotated])
    masks = np.zeros_like(truth)
    masks[..., pixels:] = truth[..., : truth.shape[-1] - pixels]
    return masks, truth


def test_davis_folders_score_as_in_the_public_benchmark(tmp_path):
    benchmark = pytest.importorskip("vos_benchmark.benchmark", reason="needs the vos-benchmark package").benchmark
    metric = METRICS.build(dict(type="JFMetric"))
    videos = read_videos(write_clips(tmp_path / "clips", 3, seed=2, frames=6, size=96), "davis")
    for video, pixels in zip(videos, (0, 3, 7), strict=True):
        masks, truth = shifted(video, pixels)
        folder = tmp_path / "found" / video.name
        folder.mkdir(parents=True)
        for t, frame in zip(video.annotated, masks, strict=True):
            labels = (frame * np.array(video.objects)[:, None, None]).max(0).astype(np.uint8)
            Image.fromarray(labels).save(folder / f"{t:05d}.png")
        metric.process({}, [dict(name=video.name, objects=video.objects, masks=masks, truth=truth)])
    root = tmp_path / "clips" / "Annotations" / "480p"
    (jf,), (j,), (f,), (rows,) = benchmark([str(root)], [str(tmp_path / "found")], True, 1, verbose=False)
    sequences, found = metric.sequences(), metric.evaluate(3)
    assert [100 * found[f"vos/{key}"] for key in ("J&F", "J", "F")] == pytest.approx([jf, j, f], abs=1e-6)
    assert len(sequences) == 3
    for name, row in sequences.items():
        assert 100 * row["J"] == pytest.approx(np.mean(list(rows[name][0].values())), abs=1e-6)
    assert found["vos/J"] < 0.95 < metric_of(shifted(videos[0], 0))["J"]


def metric_of(pair):
    metric = JFMetric()
    metric.process({}, [dict(name="x", objects=[1], masks=pair[0], truth=pair[1])])
    return metric.compute_metrics(metric.results)


def test_objects_are_averaged_not_sequences():
    metric, here, empty = JFMetric(), np.ones((4, 1, 8, 8), bool), np.zeros((4, 1, 8, 8), bool)
    two = np.concatenate([here, here], 1)
    metric.process({}, [dict(name="a", objects=[1, 2], masks=two, truth=two)])
    metric.process({}, [dict(name="b", objects=[1], masks=empty, truth=here)])
    assert metric.compute_metrics(metric.results)["J"] == pytest.approx(2 / 3)
    assert {name: row["J"] for name, row in metric.sequences().items()} == {"a": 1, "b": 0}


def test_nothing_to_measure_is_an_error():
    empty = np.zeros((4, 1, 8, 8), bool)
    with pytest.raises(ValueError, match="no object to measure"):
        metric_of((empty, empty))
