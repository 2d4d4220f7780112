# SPDX-License-Identifier: Apache-2.0
"""A quantized SAM as two ONNX graphs, image encoder and mask decoder, and onnxruntime to run them."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ahcq_plugin.export.convert import check_frozen
from ahcq_plugin.export.onnx_quantizers import StoredWeight, onnx_quantizer
from ahcq_plugin.ptq.prepared import is_weight, quantizers, weight_layers
from ahcq_plugin.support.files import replacing

ENCODER_FILE, DECODER_FILE = "image_encoder.onnx", "mask_decoder.onnx"
OPSET = 17


class BoxDecoder(nn.Module):
    """Prompt encoder and mask decoder of a SAM for boxes, one mask a box, as ``zoo.sam.box_forward`` runs them."""

    def __init__(self, sam: nn.Module):
        super().__init__()
        self.prompt_encoder, self.mask_decoder = sam.prompt_encoder, sam.mask_decoder

    def forward(self, image_embeddings: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        sparse, dense = self.prompt_encoder(points=None, boxes=boxes, masks=None)
        return self.mask_decoder(
            image_embeddings=image_embeddings,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )


@torch.no_grad()
def export_onnx(
    qmodel: nn.Module,
    path: str | Path,
    args: tuple[Any, ...] | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> None:
    """Write a SAM as ``image_encoder.onnx`` and ``mask_decoder.onnx`` into a folder, or any model as one file.

    Args:
        qmodel: frozen.
        path: a folder; with ``args`` the file.
        args: what ``qmodel`` is called with, positional; sizes stay those of these tensors but for ``dynamic``. None:
            ``qmodel`` is a SAM.
        dynamic: input -> axis -> name, of sizes that may change; inputs are called as the parameters of ``forward``.

    The graphs compute in float32 what the fake-quantized model does. Uniform and grouped quantizers are
    QuantizeLinear and DequantizeLinear, the others comparisons with their boundaries; weights are stored as codes.
    Inputs and outputs of a SAM: ``image`` (1, 3, S, S) -> ``image_embeddings``; ``image_embeddings``, ``boxes`` (N, 4)
    -> ``masks`` (N, 1, h, w) logits, ``iou_predictions`` (N, 1); any N.

    Raises:
        SpecError: the model is not frozen.
        ModuleNotFoundError: the package onnx is not installed.
        AttributeError: without ``args``, the model is not a SAM.
        ValueError: ``dynamic`` names no input.
    """
    if importlib.util.find_spec("onnx") is None:
        raise ModuleNotFoundError("ONNX export needs the packages onnx, onnxruntime: pip install 'ahcq_plugin[onnx]'")
    if args is not None:
        names = list(inspect.signature(qmodel.forward).parameters)[: len(args)]
        unknown = sorted(set(dynamic or ()) - set(names))
        if unknown:
            raise ValueError(f"`dynamic` names inputs that are none: {unknown}; inputs: {names}")
        _write(onnx_model(qmodel), args, Path(path), names, [], {k: dict(v) for k, v in (dynamic or {}).items()})
        return
    sam = onnx_model(qmodel)
    side, device = sam.image_encoder.img_size, next(sam.parameters()).device
    image = torch.zeros(1, 3, side, side, device=device)
    boxes = torch.tensor([[0.0, 0.0, side / 2, side / 2], [side / 4, 0.0, side / 2, side]], device=device)
    embeddings = sam.image_encoder(image)
    _write(sam.image_encoder, (image,), Path(path) / ENCODER_FILE, ["image"], ["image_embeddings"], {})
    names = ["image_embeddings", "boxes"], ["masks", "iou_predictions"]
    dynamic = {name: {0: "boxes"} for name in ("boxes", *names[1])}
    _write(BoxDecoder(sam), (embeddings, boxes), Path(path) / DECODER_FILE, *names, dynamic)


def onnx_model(qmodel: nn.Module) -> nn.Module:
    """A copy of a frozen model whose quantizers are modules that ONNX can express; it computes the same bits.

    Raises:
        SpecError: the model is not frozen.
    """
    model = copy.deepcopy(qmodel).eval()
    for name, quantizer in list(quantizers(model)):
        check_frozen(quantizer)
        if not is_weight(quantizer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, onnx_quantizer(quantizer))
    for layer in weight_layers(model).values():
        layer.weight_fake_quant = StoredWeight(layer)
    return model


class OnnxSam:
    """The two graphs in onnxruntime, on the CPU.

    Args:
        path: the folder that ``export_onnx`` wrote.
        threads: onnxruntime's threads within an operator; 0: as many as it likes.
    """

    def __init__(self, path: str | Path, threads: int = 0):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(str(Path(path) / name), options, providers=["CPUExecutionProvider"])
            for name in (ENCODER_FILE, DECODER_FILE)
        )

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As ``zoo.sam.box_forward``: ``image``, ``boxes`` -> mask logits (N, 1, h, w), predicted IoU (N, 1)."""
        (embeddings,) = self.encoder.run(None, {"image": batch["image"].cpu().numpy()})
        outputs = self.decoder.run(None, {"image_embeddings": embeddings, "boxes": batch["boxes"].cpu().numpy()})
        masks, quality = map(torch.from_numpy, outputs)
        return masks, quality


def _write(model: nn.Module, args: tuple, path: Path, inputs: list, outputs: list, dynamic: dict[str, Any]) -> None:
    with replacing(path) as temporary, warnings.catch_warnings():
        # the tracer warns of sizes it takes as constants: the image's size is one
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            args,
            str(temporary),
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=dynamic,
            do_constant_folding=False,  # it would turn the codes of weights into floats
            dynamo=False,
        )
