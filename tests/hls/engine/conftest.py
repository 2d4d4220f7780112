# SPDX-License-Identifier: Apache-2.0
"""What the engine's tests share: launching a matmul on codes."""

from __future__ import annotations

import pytest

from ahcq_plugin.hls.engine.compile import Command, compile_matmul
from ahcq_plugin.hls.engine.config import EngineConfig
from ahcq_plugin.hls.engine.image import Image
from ahcq_plugin.hls.vectors import Vectors


def _launch(matmul, vectors: Vectors, config: EngineConfig, image: Image, **options) -> Command:
    batch, rows, _ = vectors.left.shape
    command = compile_matmul(matmul, image, config, rows=rows, batch=batch, **options)
    if "left" not in options:
        command.write_left(image, vectors.left)
    if vectors.right is not None and "right" not in options:
        command.write_right(image, vectors.right)
    return command


@pytest.fixture(scope="session")
def launch():
    """launch(matmul, vectors, config, image, **options of compile_matmul): a command with its codes in memory."""
    return _launch
