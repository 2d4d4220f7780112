# SPDX-License-Identifier: Apache-2.0
"""A SAM as two ONNX graphs, image encoder and prompt decoder, with the JSON that says how to use them."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ahcq_plugin.export.convert import check_frozen
from ahcq_plugin.export.onnx_bundle import DECODER_FILE, ENCODER_FILE, write_bundle
from ahcq_plugin.export.onnx_deploy import DeployLinear, DequantizedWeight, deploy_quantizer, scale_products
from ahcq_plugin.export.onnx_int4 import INT4_BITS, pack_weights
from ahcq_plugin.export.onnx_quantizers import StoredWeight, onnx_quantizer
from ahcq_plugin.export.onnx_symbolic import mended_symbolics
from ahcq_plugin.graph.units import prepared_units
from ahcq_plugin.ptq.prepared import is_weight, quantizers, weight_layers
from ahcq_plugin.quantizers import QuantLinear
from ahcq_plugin.support.files import replacing

OPSET = 17


class PromptDecoder(nn.Module):
    """Prompt encoder and mask decoder of a SAM with the inputs of SAM's own ONNX decoder, so that one graph serves all
    prompts: labels choose the embedding of a point, and a mask is weighted by ``has_mask_input``."""

    def __init__(self, sam: nn.Module):
        super().__init__()
        self.prompt_encoder, self.mask_decoder = sam.prompt_encoder, sam.mask_decoder

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Shapes as ``export_onnx`` says; the masks of all tokens, (N, tokens, h, w), and their predicted IoU."""
        return self.mask_decoder.predict_masks(
            image_embeddings=image_embeddings,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=self._points(point_coords, point_labels),
            dense_prompt_embeddings=self._mask(mask_input, has_mask_input),
        )

    def _points(self, coords: Tensor, labels: Tensor) -> Tensor:
        encoder, labels = self.prompt_encoder, labels[..., None]
        # of a pixel the centre
        found = encoder.pe_layer.forward_with_coords(coords + 0.5, encoder.input_image_size)
        found = torch.where(labels == -1, encoder.not_a_point_embed.weight, found)
        for label, embedding in enumerate(encoder.point_embeddings):
            found = torch.where(labels == label, found + embedding.weight, found)
        return found

    def _mask(self, mask: Tensor, given: Tensor) -> Tensor:
        encoder = self.prompt_encoder
        none = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        return torch.where(given.reshape(-1, 1, 1, 1) > 0, encoder.mask_downscaling(mask), none)


@torch.no_grad()
def export_onnx(
    qmodel: nn.Module,
    path: str | Path,
    args: tuple[Any, ...] | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    style: str = "exact",
    int4: bool = False,
) -> None:
    """Write a SAM as a folder of two graphs and ``bundle.json``, or any model as one file.

    Args:
        qmodel: frozen; with ``style="float"`` not quantized.
        path: a folder; with ``args`` the file.
        args: what ``qmodel`` is called with, positional; sizes stay those of these tensors but for ``dynamic``. None:
            ``qmodel`` is a SAM.
        dynamic: input -> axis -> name, of sizes that may change; inputs are called as the parameters of ``forward``.
        style: ``exact``: the graphs compute in float32 what the fake-quantized model does; ``deploy``: QDQ with one
            scale a tensor and int8 weights, which runtimes execute on integers (:mod:`.onnx_deploy`); ``float``: the
            model as it is, to compare with.
        int4: of ``deploy``: weights of at most 4 bits are stored as INT4, and the opset is 21; a runtime that has no
            product of integers with such weights computes it in floating point.

    Inputs and outputs of a SAM, float32: ``image`` (1, 3, S, S) -> ``image_embeddings``; ``image_embeddings``,
    ``point_coords`` (N, P, 2) x, y in pixels of the input, ``point_labels`` (N, P): 0 background, 1 foreground, 2 and 3
    the corners of a box, -1 none, ``mask_input`` (1 or N, 1, h, w) logits, ``has_mask_input`` (1,) 0 or 1 -> ``masks``
    (N, T, h, w) logits and ``iou_predictions`` (N, T) of all T mask tokens; any N, P.

    Raises:
        SpecError: the model is not frozen.
        ModuleNotFoundError: the package onnx is not installed.
        AttributeError: without ``args``, the model is not a SAM.
        ValueError: ``dynamic`` names no input; an unknown style; ``int4`` without ``deploy`` or without weights of at
            most 4 bits; ``float`` of a quantized model.
    """
    if importlib.util.find_spec("onnx") is None:
        raise ModuleNotFoundError("ONNX export needs the packages onnx, onnxruntime: pip install 'ahcq_plugin[onnx]'")
    prepare, write = _maker(qmodel, style, int4), partial(_write, int4=int4)
    if args is not None:
        names = list(inspect.signature(qmodel.forward).parameters)[: len(args)]
        unknown = sorted(set(dynamic or ()) - set(names))
        if unknown:
            raise ValueError(f"`dynamic` names inputs that are none: {unknown}; inputs: {names}")
        write(prepare(qmodel), args, Path(path), names, [], {k: dict(v) for k, v in (dynamic or {}).items()})
        return
    prepared = prepare(qmodel)
    side, device = prepared.image_encoder.img_size, next(prepared.parameters()).device
    image = torch.zeros(1, 3, side, side, device=device)
    embeddings = prepared.image_encoder(image)
    write(prepared.image_encoder, (image,), Path(path) / ENCODER_FILE, ["image"], ["image_embeddings"], {})
    mask = torch.zeros(1, 1, *prepared.prompt_encoder.mask_input_size, device=device)
    points = torch.tensor([[[0.0, 0.0], [side / 2, side / 2]]] * 2, device=device)
    prompts = points, torch.tensor([[2.0, 3.0]] * 2, device=device), mask, torch.zeros(1, device=device)
    inputs = list(inspect.signature(PromptDecoder.forward).parameters)[1:]
    outputs = ["masks", "iou_predictions"]
    sizes = {name: {0: "prompts", 1: "points"} for name in ("point_coords", "point_labels")}
    sizes |= {name: {0: "prompts"} for name in outputs} | {"mask_input": {0: "mask_inputs"}}
    write(PromptDecoder(prepared), (embeddings, *prompts), Path(path) / DECODER_FILE, inputs, outputs, sizes)
    write_bundle(qmodel, path, style)


def _maker(model: nn.Module, style: str, int4: bool) -> Callable[[nn.Module], nn.Module]:
    """What makes the model to export; ValueError for what cannot be."""
    makers: dict[str, Callable[[nn.Module], nn.Module]] = {
        "exact": onnx_model,
        "deploy": partial(deploy_model, int4=int4),
        "float": lambda floating: floating,
    }
    if style not in makers:
        raise ValueError(f"`style` must be one of {', '.join(makers)}, got {style!r}")
    if style == "float" and any(True for _ in quantizers(model)):
        raise ValueError("style 'float' is for models that are not quantized, this one is: use 'exact' or 'deploy'")
    if int4:
        few = [q for _, q in quantizers(model) if is_weight(q) and q.bits <= INT4_BITS]
        if style != "deploy" or not few:
            least = min((q.bits for _, q in quantizers(model) if is_weight(q)), default=None)
            raise ValueError(
                f"`int4` stores weights of at most {INT4_BITS} bits in style 'deploy', got style {style!r} and weights "
                f"of {least} bits or more: leave it out"
            )
    return makers[style]


def onnx_model(qmodel: nn.Module) -> nn.Module:
    """A copy of a frozen model whose quantizers are modules that ONNX can express; it computes the same bits.

    Raises:
        SpecError: the model is not frozen.
    """
    model = copy.deepcopy(qmodel).eval()
    _put_stand_ins(model, onnx_quantizer, StoredWeight)
    return model


def deploy_model(qmodel: nn.Module, int4: bool = False) -> nn.Module:
    """A copy of a frozen model in QDQ form, see :mod:`ahcq_plugin.export.onnx_deploy`; it computes what its graph does.

    Raises:
        SpecError: the model is not frozen.
    """
    model = copy.deepcopy(qmodel).eval()
    for unit in prepared_units(model).values():
        scale_products(unit)
    _put_stand_ins(model, deploy_quantizer, partial(DequantizedWeight, int4=int4))
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, QuantLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, DeployLinear(layer))
    return model


def _put_stand_ins(model: nn.Module, of_activations: Callable, of_weights: Callable) -> None:
    for name, quantizer in list(quantizers(model)):
        check_frozen(quantizer)
        if not is_weight(quantizer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, of_activations(quantizer))
    for layer in weight_layers(model).values():
        layer.weight_fake_quant = of_weights(layer)


def _write(
    model: nn.Module, args: tuple, path: Path, inputs: list, outputs: list, dynamic: dict[str, Any], int4: bool = False
) -> None:
    with replacing(path) as temporary, warnings.catch_warnings(), mended_symbolics(OPSET):
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
        if int4:
            pack_weights(temporary)
