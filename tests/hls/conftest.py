# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the hardware tests: the module of cases, and all its layers compiled once per worker."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("hls_cases", Path(__file__).with_name("cases.py"))
_CASES = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_CASES)


@pytest.fixture(scope="session")
def cases():
    """The module ``cases.py``."""
    return _CASES


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """name -> (Layer, CompiledLayer) of every case, generated and compiled by g++."""
    from ahcq_plugin.hls import compile_generated, generate

    layers = {name: _CASES.make_layer(name) for name in _CASES.SHAPES}
    folder = generate(list(layers.values()), tmp_path_factory.mktemp("csim") / "layers")
    functions = compile_generated(list(layers.values()), folder)
    return {name: (layer, functions[layer.top]) for name, layer in layers.items()}


# The quantized packaged SAM, its spec and items to run it on are those of the export tests.
_SPEC = importlib.util.spec_from_file_location("export_fixtures", Path(__file__).parents[1] / "export" / "conftest.py")
_EXPORT = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_EXPORT)
quantized, spec, scenes, real_images = _EXPORT.quantized, _EXPORT.spec, _EXPORT.scenes, _EXPORT.real_images
