# SPDX-License-Identifier: Apache-2.0
"""The ways to run a SAM that are compared, each a row of the table: what it is called, its files, how it is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from ahcq_plugin import load_quantized
from ahcq_plugin.integer import to_integer
from ahcq_plugin.studies.inference import artefacts
from ahcq_plugin.studies.inference.artefacts import Subject
from ahcq_plugin.studies.inference.runners import Runner


@dataclass(frozen=True)
class Variant:
    """One way.

    Attributes:
        runtime, computes: of the table's row.
        files: what it reads, in the folder of :func:`~.artefacts.make`.
        open: (subject, folder, threads) -> the model in its runtime.
    """

    runtime: str
    computes: str
    files: str
    open: Callable[[Subject, Path, int], Runner]

    @property
    def name(self) -> str:
        """For the command line: ``openvino-bf16``."""
        return f"{self.runtime} {self.computes}".lower().replace(" ", "-")

    def bytes(self, folder: Path) -> int:
        """Size of its files."""
        path = folder / self.files
        return sum(
            file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()) if file.suffix != ".json"
        )


def _torch(subject: Subject, folder: Path, threads: int, file: str, dtype: torch.dtype, compiled: bool) -> Runner:
    model = subject.build()
    model.load_state_dict(load_file(folder / file))
    return subject.runner(model, dtype=dtype, compiled=compiled)


def _integer(subject: Subject, folder: Path, threads: int, file: str) -> Runner:
    return subject.runner(to_integer(load_quantized(folder / file)))


def _graphs(subject: Subject, folder: Path, threads: int, files: str, runtime: str, precision: str = "f32") -> Runner:
    return subject.graphs(folder / files, runtime, threads, precision)


def _of_torch(computes: str, file: str, dtype: torch.dtype, compiled: bool) -> Variant:
    return Variant("PyTorch", computes, file, partial(_torch, file=file, dtype=dtype, compiled=compiled))


def _of_graphs(title: str, computes: str, files: str, precision: str = "f32") -> Variant:
    return Variant(title, computes, files, partial(_graphs, files=files, runtime=title.lower(), precision=precision))


def _of_integers(computes: str, file: str) -> Variant:
    return Variant("ahcq_plugin", computes, file, partial(_integer, file=file))


#: What every time is compared with.
BASE = _of_torch("FP32", artefacts.FP32, torch.float32, False)
VARIANTS = (
    BASE,
    _of_torch("FP32 compiled", artefacts.FP32, torch.float32, True),
    _of_torch("BF16", artefacts.BF16, torch.bfloat16, False),
    _of_torch("BF16 compiled", artefacts.BF16, torch.bfloat16, True),
    _of_graphs("onnxruntime", "FP32", artefacts.FLOAT),
    _of_graphs("onnxruntime", "static INT8", artefacts.ORT_INT8),
    _of_graphs("onnxruntime", "our deploy W8A8", artefacts.DEPLOY),
    _of_graphs("OpenVINO", "FP32", artefacts.FLOAT),
    _of_graphs("OpenVINO", "BF16", artefacts.FLOAT, "bf16"),
    _of_graphs("OpenVINO", "NNCF INT8", artefacts.NNCF),
    _of_graphs("OpenVINO", "our deploy W8A8", artefacts.DEPLOY),
    _of_integers("integers W8A8", artefacts.W8A8),
    _of_integers("integers W4A4", artefacts.W4A4),
)
