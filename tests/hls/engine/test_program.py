# SPDX-License-Identifier: Apache-2.0
"""A whole SAM on the engine in C++ simulation: every matmul by a descriptor, in one memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ahcq_plugin.export.compare import golden_forward
from ahcq_plugin.hls.engine.program import Program, engine_forward
from ahcq_plugin.zoo.sam import box_forward


@pytest.mark.slow
def test_a_whole_image_is_the_golden_models(quantized, spec, scenes) -> None:
    out, rows = engine_forward(quantized, Program(spec), scenes[1], box_forward)
    assert len(rows) == sum(1 for _ in spec.matmuls())
    assert not any(row.different for row in rows.values())
    wanted = golden_forward(quantized, spec, scenes[1], box_forward)
    assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))
    assert np.isfinite(out[0].numpy()).all()
