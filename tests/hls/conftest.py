# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the hardware tests: the module of cases, and all its layers compiled once per worker."""

from __future__ import annotations

import pytest

from tests.hls import cases as _cases
from tests.packaged import quantized, real_images, scenes, spec

__all__ = ["quantized", "real_images", "scenes", "spec"]


@pytest.fixture(scope="session")
def cases():
    """The module ``cases.py``."""
    return _cases


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """name -> (Layer, CompiledLayer) of every case, generated and compiled by g++."""
    from ahcq_plugin.hls import compile_generated, generate

    layers = {name: _cases.make_layer(name) for name in _cases.SHAPES}
    folder = generate(list(layers.values()), tmp_path_factory.mktemp("csim") / "layers")
    functions = compile_generated(list(layers.values()), folder)
    return {name: (layer, functions[layer.top]) for name, layer in layers.items()}
