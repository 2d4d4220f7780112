# SPDX-License-Identifier: Apache-2.0
"""A SAM as two ONNX graphs, a SAM 2 as four, with the JSON that says how to use them; any model as one."""

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
from torch.utils import _pytree as pytree

from ahcq_plugin.export.convert import check_frozen
from ahcq_plugin.export.onnx_bundle import write_bundle
from ahcq_plugin.export.onnx_deploy import DeployLinear, DequantizedWeight, deploy_quantizer, scale_products
from ahcq_plugin.export.onnx_int4 import INT4_BITS, pack_weights
from ahcq_plugin.export.onnx_parts import sam_parts
from ahcq_plugin.export.onnx_quantizers import StoredWeight, onnx_quantizer
from ahcq_plugin.export.onnx_sam2_bundle import write_sam2_bundle
from ahcq_plugin.export.onnx_sam2_parts import check_sam2, is_sam2, sam2_parts, without_complex_numbers
from ahcq_plugin.export.onnx_symbolic import mended_symbolics
from ahcq_plugin.graph.units import prepared_units
from ahcq_plugin.ptq.prepared import is_weight, quantizers, weight_layers
from ahcq_plugin.quantizers import QuantLinear
from ahcq_plugin.support.batches import naming_item
from ahcq_plugin.support.files import given_path, replacing
from ahcq_plugin.support.given import check_flag, check_model

OPSET = 17


@torch.no_grad()
def export_onnx(
    qmodel: nn.Module,
    path: str | Path,
    args: tuple[Any, ...] | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    style: str = "exact",
    int4: bool = False,
) -> None:
    """Write a SAM, or a SAM 2, as a folder of graphs and ``bundle.json``, or any model as one file.

    Args:
        qmodel: frozen; with ``style="float"`` not quantized.
        path: a folder; with ``args`` the file.
        args: what ``qmodel`` is called with, positional; sizes stay those of these tensors but for ``dynamic``. None:
            ``qmodel`` is a SAM or a SAM 2.
        dynamic: input -> axis -> name, of sizes that may change; inputs are called as the parameters of ``forward``,
            those of ``*xs`` ``xs_0``, ``xs_1``; an input that nothing reads may be left out of the graph.
        style: ``exact``: the graphs compute in float32 what the fake-quantized model does; ``deploy``: QDQ with one
            scale a tensor and int8 weights, which runtimes execute on integers (:mod:`.onnx_deploy`); ``float``: the
            model as it is, to compare with.
        int4: of ``deploy``: weights of at most 4 bits are stored as INT4, and the opset is 21; a runtime that has no
            product of integers with such weights computes it in floating point.

    Inputs and outputs of a SAM, float32: ``image`` (1, 3, S, S) -> ``image_embeddings``; ``image_embeddings``,
    ``point_coords`` (N, P, 2) x, y in pixels of the input, ``point_labels`` (N, P): 0 background, 1 foreground, 2 and 3
    the corners of a box, -1 none, ``mask_input`` (1 or N, 1, h, w) logits, ``has_mask_input`` (1,) 0 or 1 -> ``masks``
    (N, T, h, w) logits and ``iou_predictions`` (N, T) of all T mask tokens; any N, P. Those of a SAM 2 stand in
    ``docs/export.md``.

    Raises:
        SpecError: the model is not frozen.
        ModuleNotFoundError: the package onnx is not installed.
        TypeError: no model, ``args`` of another kind; without ``args``, the model is neither.
        ValueError: ``dynamic`` names no input or no axis; ``args`` that the model does not take; an unknown style;
            ``int4`` without ``deploy`` or without weights of at most 4 bits; ``float`` of a quantized model; a SAM 2
            that its driver could not follow.
    """
    if importlib.util.find_spec("onnx") is None:
        raise ModuleNotFoundError("ONNX export needs the packages onnx, onnxruntime: pip install 'ahcq_plugin[onnx]'")
    check_model(qmodel, "qmodel")
    path, dynamic = given_path(path), dynamic or {}
    if args is not None:
        _check_call(args, dynamic)
    elif not (is_sam2(qmodel) or hasattr(qmodel, "mask_decoder")):
        raise TypeError(f"a {type(qmodel).__name__} is no SAM or SAM 2: give `args`, what the model is called with")
    prepare, write = _maker(qmodel, style, int4), partial(_write, int4=int4)
    qmodel, args = _on_the_cpu(qmodel, args)
    if args is not None:
        names = _input_names(qmodel.forward, len(args))
        _check_dynamic(dynamic, dict(zip(names, args, strict=False)))
        model = prepare(qmodel)
        without_complex_numbers(model)
        with naming_item("args"):
            model(*args)
        write(model, args, path, names, [], {k: dict(v) for k, v in dynamic.items()})
        return
    of_videos = is_sam2(qmodel)
    if of_videos:
        check_sam2(qmodel)
    prepared = prepare(qmodel)
    for part in sam2_parts(prepared) if of_videos else sam_parts(prepared):
        write(part.module, part.args, path / part.file, part.inputs, part.outputs, part.dynamic)
    (write_sam2_bundle if of_videos else write_bundle)(qmodel, path, style)


def _input_names(forward: Callable[..., Any], count: int) -> list[str]:
    """Of ``count`` positional arguments."""
    names: list[str] = []
    for name, parameter in inspect.signature(forward).parameters.items():
        several = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        names += [f"{name}_{i}" for i in range(count - len(names))] if several else [name]
    return names[:count]


def _check_call(args: Any, dynamic: Any) -> None:
    if not isinstance(args, tuple):
        raise TypeError(f"`args` must be a tuple, what the model is called with, got {type(args).__name__}")
    if not isinstance(dynamic, Mapping) or not all(isinstance(axes, Mapping) for axes in dynamic.values()):
        raise TypeError(f"`dynamic` must be {{input: {{axis: name}}}}, got {dynamic!r:.80}")


def _check_dynamic(dynamic: Mapping[str, Mapping[int, str]], inputs: Mapping[str, Any]) -> None:
    """Axes and names are such that torch and ONNX know; torch crashes at an axis below 0."""
    unknown = sorted(set(dynamic) - set(inputs))
    if unknown:
        raise ValueError(f"`dynamic` names inputs that are none: {unknown}; inputs: {list(inputs)}")
    for name, axes in dynamic.items():
        rank = inputs[name].ndim if isinstance(inputs[name], Tensor) else 0
        for axis, size in axes.items():
            if type(axis) is not int or not 0 <= axis < rank:
                raise ValueError(f"`dynamic` of {name!r} has the axis {axis!r}; its tensor has {rank}, from 0 on")
            if not isinstance(size, str) or not size.isidentifier():
                raise ValueError(f"`dynamic` of {name!r} calls axis {axis} {size!r}, a name is letters and digits")


def _on_the_cpu(model: nn.Module, args: Any) -> tuple[nn.Module, Any]:
    """Where the exporter follows a model: on other devices, sizes that it follows are tensors of the CPU among those of
    the device, and SAM's decoder fails."""
    if all(p.device.type == "cpu" for p in model.parameters()):
        return model, args
    return copy.deepcopy(model).cpu(), pytree.tree_map_only(Tensor, Tensor.cpu, args)


def _maker(model: nn.Module, style: str, int4: bool) -> Callable[[nn.Module], nn.Module]:
    """What makes the model to export, one of its own; ValueError for what cannot be."""
    makers: dict[str, Callable[[nn.Module], nn.Module]] = {
        "exact": onnx_model,
        "deploy": partial(deploy_model, int4=int4),
        "float": lambda floating: copy.deepcopy(floating).eval(),
    }
    check_flag(int4, "int4")
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
