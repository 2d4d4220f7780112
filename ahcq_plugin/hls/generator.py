# SPDX-License-Identifier: Apache-2.0
"""From a layer spec to a folder of HLS C++: the kernels and one folder a matmul. ``tools/make_hls.py`` calls it."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ahcq_plugin.export import Matmul, Spec, SpecError, UnitSpec
from ahcq_plugin.hls.csim import CompiledLayer, compile_layers
from ahcq_plugin.hls.layer import layer_files, quantizer_names, top_name
from ahcq_plugin.hls.layout import lay_out
from ahcq_plugin.hls.options import HLSOptions
from ahcq_plugin.hls.resources import sources
from ahcq_plugin.hls.vectors import Vectors, make_vectors

MANIFEST = "layers.json"
FORMAT = "ahcq_plugin.hls/1"
DEFAULT_ROWS = 8


@dataclass(frozen=True, eq=False)
class Layer:
    """One matmul to generate.

    Attributes:
        unit: name of its unit, "" for a matmul of its own.
        matmul: the matmul.
        vectors: golden vectors of the test bench; None: ``DEFAULT_ROWS`` random and directed rows.
    """

    unit: str
    matmul: Matmul
    vectors: Vectors | None = None

    @property
    def top(self) -> str:
        """Name of its top function and of its folder."""
        return top_name(self.unit, self.matmul.name)


def select(spec: Spec, patterns: Sequence[str] = ("*",)) -> list[Layer]:
    """The layers whose ``unit.matmul`` or unit matches one of the shell ``patterns``, in the order of the spec.

    Raises:
        SpecError: a pattern matches nothing.
    """
    pairs = list(spec.matmuls())
    for pattern in patterns:
        if not any(_matches(unit, matmul, pattern) for unit, matmul in pairs):
            names = ", ".join(unit.name for unit in spec.units)
            raise SpecError(f"{pattern!r} matches no unit and no matmul (unit.matmul) of the spec; units: {names}")
    return [
        Layer(unit.name, matmul)
        for unit, matmul in pairs
        if any(_matches(unit, matmul, pattern) for pattern in patterns)
    ]


def generate(layers: Sequence[Layer], folder: str | Path, options: HLSOptions | Mapping[str, HLSOptions]) -> Path:
    """Write ``folder``: ``include/`` (the kernels), a folder for each layer, and ``layers.json``.

    Equal layers and options give equal bytes. Atomic: a new folder takes the place of an old one when it is complete.

    Args:
        options: for all layers, or by the name of a layer's top.
    Raises:
        SpecError: layers that do not fit the options, or whose names are equal as C++ names.
        FileExistsError: ``folder`` is not one that ``generate`` wrote before.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / MANIFEST).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and was not written by make_hls; remove it or give another folder")
    tops = [layer.top for layer in layers]
    if len(set(tops)) != len(tops):
        raise SpecError(f"layers with the same C++ name: {sorted({top for top in tops if tops.count(top) > 1})}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        work.chmod(0o755)
        shutil.copytree(sources("include"), work / "include")
        entries = []
        for layer in layers:
            chosen = options if isinstance(options, HLSOptions) else options[layer.top]
            vectors = layer.vectors or make_vectors(layer.matmul, 2, DEFAULT_ROWS, seed=0)
            (work / layer.top).mkdir()
            for name, text in layer_files(layer.top, layer.matmul, chosen, vectors).items():
                (work / layer.top / name).write_text(text, encoding="utf-8")
            entries.append(_entry(layer, chosen))
        manifest = dict(format=FORMAT, layers=entries)
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _replace(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return folder


def compile_generated(
    layers: Sequence[Layer], folder: Path, options: HLSOptions | Mapping[str, HLSOptions], kernels: Path | None = None
) -> dict[str, CompiledLayer]:
    """The layers that ``generate`` wrote to ``folder``, compiled together and callable from Python, by top name."""
    chosen = [options if isinstance(options, HLSOptions) else options[layer.top] for layer in layers]
    parts = [
        (layer.top, layer.top, layer.matmul, lay_out(layer.matmul, settings).scales, quantizer_names(layer.matmul))
        for layer, settings in zip(layers, chosen, strict=True)
    ]
    return compile_layers(Path(folder).resolve(), parts, (kernels or Path(folder) / "include").resolve())


def _entry(layer: Layer, options: HLSOptions) -> dict[str, object]:
    matmul = layer.matmul
    layout = lay_out(matmul, options)
    return dict(
        top=layer.top,
        unit=layer.unit,
        matmul=matmul.name,
        kind=matmul.kind,
        family=matmul.left.family,
        k=matmul.k,
        n=matmul.n,
        lanes=layout.lanes,
        simd=layout.simd,
        row_cycles=layout.tiles * layout.folds,
        weight_bits=int(np.prod((layout.tiles, layout.folds, layout.lanes, layout.simd))) * matmul.right.bits,
    )


def _matches(unit: UnitSpec, matmul: Matmul, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (unit.name, f"{unit.name}.{matmul.name}"))


def _replace(work: Path, folder: Path) -> None:
    """Put ``work`` where ``folder`` is; a directory cannot be replaced in one step, so the old one steps aside."""
    aside = work.with_name(work.name + "-old")
    if folder.exists():
        os.replace(folder, aside)
    os.replace(work, folder)
    shutil.rmtree(aside, ignore_errors=True)
