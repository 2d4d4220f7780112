# SPDX-License-Identifier: Apache-2.0
"""The files of every way to run a SAM, made once in a folder: weights, graphs, the integers of others and our own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ahcq_plugin import load_quantized, quantize, save_quantized
from ahcq_plugin.export import export_onnx
from ahcq_plugin.ptq import Recipe
from ahcq_plugin.studies.inference.runners import GraphSam, GraphSam2, TorchSam, TorchSam2
from ahcq_plugin.studies.inference.timing import noise, quantized_by_guess
from ahcq_plugin.support.files import replacing, replacing_folder
from ahcq_plugin.zoo.items import scene_items
from ahcq_plugin.zoo.predict import make_batch
from ahcq_plugin.zoo.sam import box_forward, build_sam
from ahcq_plugin.zoo.sam2 import build_sam2

GRAPHS = ("image_encoder", "mask_decoder")
FP32, BF16, FLOAT, ORT_INT8, NNCF, DEPLOY = (
    "fp32.safetensors",
    "bf16.safetensors",
    "onnx",
    "onnx_int8",
    "nncf",
    "deploy",
)
W8A8, W4A4 = "w8a8.safetensors", "w4a4.safetensors"
#: The recipes of the two; few iterations need larger steps (docs/results.md).
RECIPES = {
    W8A8: {"name": "rtn", "w_bits": 8, "a_bits": 8},
    W4A4: {"name": "ahcq", "w_bits": 4, "a_bits": 4, "iterations": 100, "rounding_lr": 3e-2, "scale_lr": 2.7e-3},
}
#: What others' tools need beside this package; without them their files are not made.
NEEDS = {NNCF: ("nncf", "openvino")}
_MADE_OF = {ORT_INT8: FLOAT, NNCF: FLOAT, DEPLOY: W8A8}
_BOXES = 4


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        name: as the zoo's builders take it.
        trained: the package has its weights; without, they are random, quantizers are guessed, and masks are not
            compared.
        images: that others' and our quantization is calibrated with.
    """

    name: str
    trained: bool
    images: int = 16

    @property
    def is_sam2(self) -> bool:
        """A SAM 2 and not a SAM."""
        return self.name.startswith("sam2")

    def build(self) -> nn.Module:
        """In floating point; random weights are the same each time."""
        torch.manual_seed(0)
        builder = build_sam2 if self.is_sam2 else build_sam
        return builder(self.name, checkpoint=None if self.trained else False)

    def runner(self, model: nn.Module, **options: Any) -> TorchSam | TorchSam2:
        """``model``, of this architecture, as a runner."""
        return (TorchSam2 if self.is_sam2 else TorchSam)(model, **options)

    def graphs(self, folder: Path, runtime: str, threads: int, precision: str = "f32") -> GraphSam:
        """The graphs of such a model in a folder; arguments as of :class:`~.runners.GraphSam`."""
        return (GraphSam2 if self.is_sam2 else GraphSam)(self.build(), folder, runtime, threads, precision)

    def batches(self, count: int, seed: int) -> list[dict[str, Tensor]]:
        """``image`` and ``boxes`` in pixels of the input: of generated scenes, of noise where not trained."""
        model = self.build()
        if self.trained:
            items = [item for item in scene_items(2 * count, seed) if len(item.boxes)][:count]
            return [make_batch(model, item.image, item.boxes[:_BOXES]) for item in items]
        return [noise(image_size(model), _BOXES, seed + index) for index in range(count)]


def image_size(model: nn.Module) -> int:
    """Side of the input of a SAM or SAM 2."""
    return int(model.image_encoder.img_size if hasattr(model, "mask_decoder") else model.image_size)


@torch.no_grad()
def make(subject: Subject, folder: Path, wanted: Iterable[str]) -> None:
    """Make what is missing of ``wanted`` in ``folder``, one after the other; a file or folder that is there is whole.

    What needs a package that is not installed is left out (:func:`lacking`).
    """
    files: dict[str, Callable[[Path], None]] = {
        FP32: lambda path: _save_weights(subject.build(), path),
        BF16: lambda path: _save_weights(subject.build().to(torch.bfloat16), path),
        **{name: partial(_save_quantized, subject, name) for name in RECIPES},
    }
    folders: dict[str, Callable[[Path], None]] = {
        FLOAT: lambda path: export_onnx(subject.build(), path, style="float"),
        ORT_INT8: lambda path: _onnxruntime_int8(subject, folder / FLOAT, path),
        NNCF: lambda path: _nncf_int8(subject, folder / FLOAT, path),
        DEPLOY: lambda path: export_onnx(load_quantized(folder / W8A8), path, style="deploy"),
    }
    names = {FP32, *wanted}
    names |= {source for name, source in _MADE_OF.items() if name in names}
    for name, write in (files | folders).items():
        if name in names and not (folder / name).exists() and not lacking(name):
            with (replacing if name in files else replacing_folder)(folder / name) as temporary:
                write(temporary)


def lacking(name: str) -> list[str]:
    """Packages that are not installed and that making a file or folder needs."""
    return [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]


def _save_weights(model: nn.Module, path: Path) -> None:
    save_file({name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}, path)


def _save_quantized(subject: Subject, name: str, path: Path) -> None:
    if not subject.trained:
        save_quantized(quantized_by_guess(subject.build(), Recipe.from_config(RECIPES[name])), path)
        return
    with torch.enable_grad():
        items = subject.batches(subject.images, seed=11)
        model, report = quantize(subject.build(), items, RECIPES[name], forward=box_forward)
    save_quantized(model, path, report=report)


def _calibration(subject: Subject, floating: Path) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Inputs of the encoder's and of the decoder's graph."""
    graphs = subject.graphs(floating, "onnxruntime", 0)
    for batch in subject.batches(subject.images, seed=11):
        yield {"image": batch["image"].numpy()}, graphs.inputs(graphs.encode(batch["image"]), batch["boxes"])


def _onnxruntime_int8(subject: Subject, floating: Path, folder: Path) -> None:
    """Static quantization as onnxruntime's documentation has it: QDQ, weights by channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self, items: Iterable[dict[str, np.ndarray]]):
            self.items = iter(items)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.items, None)

    samples = list(_calibration(subject, floating))
    for part, (name, items) in enumerate(zip(GRAPHS, zip(*samples, strict=True), strict=True)):
        optimised = folder / f"{part}.onnx"
        quant_pre_process(floating / f"{name}.onnx", optimised, skip_symbolic_shape=True)
        quantize_static(
            optimised,
            folder / f"{name}.onnx",
            Reader(items),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
        )
        optimised.unlink()


def _nncf_int8(subject: Subject, floating: Path, folder: Path) -> None:
    """OpenVINO's own: ``nncf.quantize`` with its settings for transformers."""
    import nncf
    import openvino

    samples = list(_calibration(subject, floating))
    for name, items in zip(GRAPHS, zip(*samples, strict=True), strict=True):
        graph = openvino.Core().read_model(floating / f"{name}.onnx")
        data = nncf.Dataset(list(items))
        graph = nncf.quantize(graph, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(items))
        openvino.save_model(graph, folder / f"{name}.xml", compress_to_fp16=False)
