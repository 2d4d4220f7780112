# SPDX-License-Identifier: Apache-2.0
"""From layers to a folder of HLS C++: the kernels and one folder a layer. ``tools/make_hls.py`` calls it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ahcq_plugin.export import SpecError
from ahcq_plugin.hls.layer import Layer
from ahcq_plugin.hls.resources import sources
from ahcq_plugin.hls.texts import layer_files
from ahcq_plugin.hls.vectors import make_vectors
from ahcq_plugin.support.files import given_path, replacing_folder

MANIFEST = "layers.json"
FORMAT = "ahcq_plugin.hls/2"
DEFAULT_ROWS = 8


def generate(layers: Sequence[Layer], folder: str | Path) -> Path:
    """Write ``folder``: ``include/`` (the kernels), a folder for each layer, and ``layers.json``.

    Equal layers give equal bytes. Atomic: a new folder takes the place of an old one when it is complete. A layer
    without vectors gets ``DEFAULT_ROWS`` random and directed rows (of products twice as many).

    Raises:
        SpecError: layers that do not fit their options, or whose names are equal as C++ names.
        FileExistsError: ``folder`` is not one that ``generate`` wrote before.
    """
    folder = given_path(folder, "folder")
    if not isinstance(layers, list | tuple) or not layers or not all(isinstance(layer, Layer) for layer in layers):
        raise SpecError("`layers` must be a list of layers, at least one, as select(spec) gives them")
    if folder.exists() and not (folder / MANIFEST).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and was not written by make_hls; remove it or give another folder")
    tops = [layer.top for layer in layers]
    if len(set(tops)) != len(tops):
        raise SpecError(f"layers with the same C++ name: {sorted({top for top in tops if tops.count(top) > 1})}")
    with replacing_folder(folder) as work:
        shutil.copytree(sources("include"), work / "include", ignore=shutil.ignore_patterns("engine"))
        for layer in layers:
            vectors = layer.vectors or make_vectors(layer.matmul, 2, DEFAULT_ROWS, seed=0)
            (work / layer.top).mkdir()
            for name, text in layer_files(layer, vectors).items():
                (work / layer.top / name).write_text(text, encoding="utf-8")
        manifest = dict(format=FORMAT, layers=[_entry(layer) for layer in layers])
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return folder


def _entry(layer: Layer) -> dict[str, object]:
    matmul, layout = layer.matmul, layer.layout
    return dict(
        top=layer.top,
        unit=layer.unit,
        matmul=matmul.name,
        kind=matmul.kind,
        family=matmul.left.family,
        k=matmul.k,
        n=matmul.n,
        pe=layout.pe,
        simd=layout.simd,
        row_cycles=layout.row_cycles,
        weight_bits=layout.tiles * layout.folds * layout.pe * layout.simd * matmul.right.bits,
    )
