# SPDX-License-Identifier: Apache-2.0
"""The state of a frozen model as ``ptq.packed`` stores it: weights as packed codes, everything else in few bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ahcq_plugin.functional import uniform
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq.prepared import weight_layers
from ahcq_plugin.quantizers.base import per_channel
from ahcq_plugin.quantizers.layers import held_weight
from ahcq_plugin.support.packing import MAX_BITS, pack, unpack

_NARROW = (torch.uint8, torch.int16, torch.int32)  # what integers are stored in when they fit
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}


def store(model: nn.Module, outside: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """How each tensor of a frozen model's state is stored, and the tensors to store.

    Raises:
        ValueError: as ``write_packed``.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    units = tuple(f"{name}." for name in prepared_units(model))
    weights = _weights(model)
    kept: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    first: dict[tuple, str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        original = first.setdefault(place, name) if tensor.numel() else name
        if original != name:
            kept[name] = {"same": original}
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise ValueError(f"{name} is of dtype {dtype}; a packed file holds {', '.join(_DTYPES)}")
        whole = tensor.cpu().contiguous()
        if name in weights and (parts := _packed_parts(weights[name], whole, state, tensors)):
            kept[name] = {"codes": parts, "dtype": dtype, "shape": list(tensor.shape)}
        elif tensor.numel() == 1 and bool(torch.isfinite(tensor)) and name not in weights:
            kept[name] = [dtype, list(tensor.shape), tensor.item()]
        else:
            kept[name] = [dtype]
            half = outside == "float16" and not name.startswith(units) and tensor.dtype == torch.float32
            tensors[name] = _half(name, whole) if half else _narrow(whole)
    return kept, tensors


def _weights(model: nn.Module) -> dict[str, list[tuple[str, nn.Module, slice]]]:
    """Name of a parameter -> the quantized layers whose weights are its rows."""
    held = defaultdict(list)
    for name, layer in weight_layers(model).items():
        parameter, rows = held_weight(name, layer)
        held[parameter].append((name, layer, rows))
    return held


def _packed_parts(
    layers: list[tuple[str, nn.Module, slice]], weight: Tensor, state: Mapping[str, Tensor], tensors: dict[str, Tensor]
) -> list[list[Any]]:
    """Put the codes of all rows of ``weight`` into ``tensors``; [] where layers do not cover it, each row once."""
    spans = [(rows.indices(len(weight)), name, layer) for name, layer, rows in layers]
    spans.sort(key=lambda span: span[0])
    ends = [0, *(stop for (_, stop, _), *_ in spans)]
    whole = [start for (start, _, _), *_ in spans] == ends[:-1] and ends[-1] == len(weight)
    if not whole or any(layer.weight_fake_quant.bits > MAX_BITS for *_, layer in spans):
        return []
    parts = []
    for (start, stop, _), name, layer in spans:
        bits = layer.weight_fake_quant.bits
        codes = layer.weight_fake_quant.encode(layer.weight.detach()).cpu().numpy()
        data = torch.from_numpy(pack(codes, bits))
        found = _decoded(data, bits, weight[start:stop].shape, *_grid(name, state), weight.dtype)
        off = int((_bits(found) != _bits(weight[start:stop])).sum())
        if off:
            raise ValueError(
                f"{off} of {found.numel()} weights of {name} are not what their codes decode to; freeze the model first"
            )
        tensors[f"{name}.weight_fake_quant.codes"] = data
        parts.append([name, start, stop, bits])
    return parts


def _grid(layer: str, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    quantizer = f"{layer}.weight_fake_quant"
    return state[f"{quantizer}.scale"].cpu(), state[f"{quantizer}.zero_point"].cpu()


def _decoded(
    data: Tensor, bits: int, shape: tuple[int, ...], scale: Tensor, zero_point: Tensor, dtype: torch.dtype
) -> Tensor:
    """Rows of a weight from their codes, as the fake quantizer computes them."""
    axis = -1 if scale.numel() == 1 else 0
    params = uniform.UniformParams(*(per_channel(values, axis, len(shape)) for values in (scale, zero_point)))
    return uniform.decode(torch.from_numpy(unpack(data.numpy(), bits, tuple(shape))), params, bits).to(dtype)


def _bits(tensor: Tensor) -> Tensor:
    """Floats as the integers of their bits, so that no two zeros are equal that differ."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _half(name: str, tensor: Tensor) -> Tensor:
    half = tensor.half()
    if bool((half.isinf() & tensor.isfinite()).any()):
        raise ValueError(f"{name} has values that float16 cannot hold (above 65504); use outside='float32'")
    return half


def _narrow(tensor: Tensor) -> Tensor:
    """Integers in the smallest type that holds them all."""
    if tensor.is_floating_point() or tensor.dtype == torch.bool or not tensor.numel():
        return tensor.clone()  # clones: the file's library refuses two names of one memory
    lo, hi = int(tensor.min()), int(tensor.max())
    fits = (t for t in _NARROW if torch.iinfo(t).min <= lo and hi <= torch.iinfo(t).max)
    return tensor.to(next(fits, tensor.dtype), copy=True)


def restore(stored: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state that ``store`` stored; ``tensors`` is empty afterwards.

    Raises:
        ValueError, KeyError, TypeError: what is stored cannot be right.
    """
    state: dict[str, Tensor] = {}
    for name, how in stored.items():
        if isinstance(how, list):
            state[name] = _plain_tensor(how, tensors.pop(name) if len(how) == 1 else None)
    for name, how in stored.items():
        if isinstance(how, Mapping) and "codes" in how:
            state[name] = _weight(how, state, tensors)
    for name, how in stored.items():
        if name not in state:
            state[name] = state[how["same"]]
    if tensors:
        raise ValueError(f"it holds tensors that nothing uses: {', '.join(sorted(tensors)[:4])}")
    return {name: state[name] for name in stored}


def _plain_tensor(how: list[Any], tensor: Tensor | None) -> Tensor:
    dtype = _dtype(how[0])
    if tensor is not None:
        return tensor.to(dtype)
    _, shape, value = how
    if any(size != 1 for size in shape) or not isinstance(value, int | float):
        raise ValueError(f"one number of shape {shape} cannot be {value!r}")
    return torch.full(shape, value, dtype=dtype)


def _weight(how: Mapping[str, Any], state: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> Tensor:
    shape, rows = how["shape"], []
    for layer, start, stop, bits in how["codes"]:
        size = (stop - start, *shape[1:])
        codes = tensors.pop(f"{layer}.weight_fake_quant.codes")
        scale, zero_point = _grid(layer, state)
        if not 2 <= bits <= MAX_BITS or scale.numel() not in (1, size[0]) or start != sum(len(part) for part in rows):
            raise ValueError(f"the weight of {layer}: rows {start} to {stop}, {bits} bits and {scale.numel()} scales")
        rows.append(_decoded(codes, bits, size, scale, zero_point, _dtype(how["dtype"])))
    weight = torch.cat(rows)
    if list(weight.shape) != shape:
        raise ValueError(f"a weight of shape {shape} has codes of {list(weight.shape)}")
    return weight


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"unknown dtype {name!r}; allowed: {', '.join(_DTYPES)}")
    return _DTYPES[name]
