# SPDX-License-Identifier: Apache-2.0
"""What the engine's tests share: launching a matmul on codes, planting a fault in the C++."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ahcq_plugin.hls.engine import simulate
from ahcq_plugin.hls.engine.compile import Command, compile_matmul
from ahcq_plugin.hls.engine.config import EngineConfig
from ahcq_plugin.hls.engine.image import Image
from ahcq_plugin.hls.resources import sources
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


@pytest.fixture
def plant(tmp_path: Path, monkeypatch):
    """plant(file, text, faulty): headers with a fault in place of a text that stands there once, for the simulation."""

    def planted(name: str, text: str, faulty: str) -> None:
        shutil.copytree(sources("include"), tmp_path / "include")
        file = tmp_path / "include" / "ahcq" / "engine" / name
        source = file.read_text(encoding="utf-8")
        assert source.count(text) == 1
        file.write_text(source.replace(text, faulty), encoding="utf-8")

        def mutated(*parts: str) -> Path:
            return tmp_path / "include" if parts == ("include",) else sources(*parts)

        monkeypatch.setattr(simulate, "sources", mutated)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    return planted
