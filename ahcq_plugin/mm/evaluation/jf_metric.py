# SPDX-License-Identifier: Apache-2.0
"""J, F and J&F of video object segmentation as an MMEngine metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mmdet.registry import METRICS
from mmengine.evaluator import BaseMetric

from ahcq_plugin.metrics.jf import score_sequence
from ahcq_plugin.mm.errors import DataError


@METRICS.register_module()
class JFMetric(BaseMetric):
    """Official J&F (see ``ahcq_plugin.metrics.jf``), values in [0, 1].

    Every data sample is a mapping with ``name`` of the sequence, ``objects`` (ids), ``masks`` and ``truth``, both
    (T, N, H, W) bool: the annotated frames, first and last among them.

    Args:
        skip_ends: leave out the first and the last annotated frame, as the benchmarks do.
    """

    default_prefix = "vos"

    def __init__(self, skip_ends: bool = True, collect_device: str = "cpu", prefix: str | None = None) -> None:
        super().__init__(collect_device, prefix)
        self.skip_ends = skip_ends

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Measure some sequences."""
        for sample in data_samples:
            scores = score_sequence(np.asarray(sample["masks"]), np.asarray(sample["truth"]), self.skip_ends)
            rows = [(score.j, score.f) for score in scores if score is not None]
            self.results.append((sample["name"], rows))

    def compute_metrics(self, results: Sequence[tuple[str, list[tuple[float, float]]]]) -> dict[str, float]:
        """Means over all objects of all sequences: ``J&F``, ``J``, ``F``.

        Raises: ValueError when no object was measured.
        """
        return mean_jf([pair for _, pairs in results for pair in pairs])

    def sequences(self) -> dict[str, dict[str, float]]:
        """The same means for each sequence that has an object."""
        return {name: mean_jf(pairs) for name, pairs in self.results if pairs}


def mean_jf(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """``J&F``, ``J`` and ``F`` of the (J, F) of some objects."""
    if not pairs:
        raise DataError("no object to measure: the annotated frames between the first and the last show none")
    j, f = (float(x) for x in np.mean(pairs, 0))
    return {"J&F": (j + f) / 2, "J": j, "F": f}
