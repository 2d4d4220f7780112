# SPDX-License-Identifier: Apache-2.0
"""The state of a frozen model as ``ptq.packed`` stores it: weights as packed codes, everything else in few bytes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ahcq_plugin.functional import uniform
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq.prepared import weight_layers
from ahcq_plugin.quantizers import FakeQuantize
from ahcq_plugin.quantizers.base import per_channel
from ahcq_plugin.quantizers.layers import held_weight
from ahcq_plugin.support.packing import MAX_BITS, pack, unpack

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}


def store(model: nn.Module, outside: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """How the tensors of a frozen model's state are stored, and the tensors to store.

    Raises:
        ValueError: as ``write_packed``.
    """
    left_out = calibration_state(model)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in left_out}
    units = tuple(f"{name}." for name in prepared_units(model))
    kept: dict[str, Any] = {name: {"same": original} for name, original in _same(state).items()}
    tensors: dict[str, Tensor] = {}
    done = set(kept)
    for name, layers in _weights(model).items():
        if name not in done and (parts := _packed_parts(layers, state[name].cpu(), state, tensors)):
            kept[name] = {"codes": parts, "dtype": _name(state[name].dtype), "shape": list(state[name].shape)}
            done |= {name, *(_grid(layer)[1] for layer, *_ in parts)}
    for name, tensor in state.items():
        if name in done:
            continue
        dtype, whole = _name(tensor.dtype), tensor.cpu().contiguous()
        if outside == "float16" and tensor.dtype == torch.float32 and tensor.numel() > 1 and not name.startswith(units):
            kept[name], tensors[name] = dtype, _half(name, whole)
        elif tensor.numel() == 1 and bool(torch.isfinite(tensor)):
            kept[name] = [dtype, list(tensor.shape), tensor.item()]
        elif bits := _bits_of_integers(whole):
            kept[name] = {"bits": bits, "dtype": dtype, "shape": list(tensor.shape)}
            tensors[name] = torch.from_numpy(pack(whole.numpy(), bits))
        else:
            tensors[name] = whole.clone()  # the file's library refuses two names of one memory
    return kept, tensors


def calibration_state(model: nn.Module) -> dict[str, Tensor]:
    """What of a prepared model's state its quantizers compute nothing with once they are frozen."""
    starts = {
        f"{name}.{part}"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, FakeQuantize)
        for part in module.calibration_state
    }
    return {
        name: value for name, value in model.state_dict().items() if name in starts or name.rpartition(".")[0] in starts
    }


def _same(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that stand under an earlier name too -> that name."""
    first: dict[tuple, str] = {}
    same = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and (original := first.setdefault(place, name)) != name:
            same[name] = original
    return same


def _name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    _dtype(name)
    return name


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
        bits, part = layer.weight_fake_quant.bits, weight[start:stop]
        scale, zero_point = (state[key].cpu() for key in _grid(name))
        codes = layer.weight_fake_quant.encode(layer.weight.detach()).cpu()
        data = torch.from_numpy(pack(torch.cat([codes.flatten(), zero_point.long()]).numpy(), bits))
        found, zeros = _decoded(data, bits, tuple(part.shape), scale, weight.dtype)
        off = int((_as_integers(found) != _as_integers(part)).sum())
        if off or zeros.dtype != zero_point.dtype or not torch.equal(zeros, zero_point):
            raise ValueError(
                f"{off} of {found.numel()} weights of {name} are not what their codes decode to; freeze the model first"
            )
        tensors[f"{name}.weight_fake_quant.codes"] = data
        parts.append([name, start, stop, bits])
    return parts


def _grid(layer: str) -> tuple[str, str]:
    """Names of a layer's scales and zero points in the state."""
    return f"{layer}.weight_fake_quant.scale", f"{layer}.weight_fake_quant.zero_point"


def _decoded(
    data: Tensor, bits: int, shape: tuple[int, ...], scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows of a weight from their codes, as the fake quantizer computes them, and their zero points (int32)."""
    count = math.prod(shape)
    codes = torch.from_numpy(unpack(data.numpy(), bits, (count + scale.numel(),)))
    zeros = codes[count:].int()
    axis = -1 if scale.numel() == 1 else 0
    params = uniform.UniformParams(*(per_channel(values, axis, len(shape)) for values in (scale, zeros)))
    return uniform.decode(codes[:count].view(shape), params, bits).to(dtype), zeros


def _as_integers(tensor: Tensor) -> Tensor:
    """Floats as the integers of their bits, so that no two zeros are equal that differ."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _half(name: str, tensor: Tensor) -> Tensor:
    half = tensor.half()
    if bool((half.isinf() & tensor.isfinite()).any()):
        raise ValueError(f"{name} has values that float16 cannot hold (above 65504); use outside='float32'")
    return half


def _bits_of_integers(tensor: Tensor) -> int:
    """How many bits the integers of a tensor take, up to 8; 0: they are negative, larger, or no integers."""
    if tensor.is_floating_point() or tensor.dtype == torch.bool or not tensor.numel():
        return 0
    bits = max(int(tensor.max()).bit_length(), 1)
    return bits if int(tensor.min()) >= 0 and bits <= MAX_BITS else 0


def restore(stored: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state that ``store`` stored; ``tensors`` is empty afterwards.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: what is stored cannot be right.
    """
    state: dict[str, Tensor] = {}
    later: dict[str, Mapping[str, Any]] = {}
    for name, how in stored.items():
        if isinstance(how, str):
            state[name] = tensors.pop(name).to(_dtype(how))
        elif isinstance(how, list):
            state[name] = _number(*how)
        elif "bits" in how:
            codes = unpack(tensors.pop(name).numpy(), how["bits"], tuple(how["shape"]))
            state[name] = torch.from_numpy(codes).to(_dtype(how["dtype"]))
        else:
            later[name] = how
    packed = {name: tensors.pop(name) for name in list(tensors) if name.endswith(".weight_fake_quant.codes")}
    state |= tensors
    tensors.clear()
    for name, how in later.items():
        if "codes" in how:
            state[name] = _weight(how, state, packed)
    if packed:
        raise ValueError(f"it holds codes that no weight uses: {', '.join(sorted(packed)[:4])}")
    return state | {name: state[how["same"]] for name, how in later.items() if "codes" not in how}


def _number(dtype: str, shape: list[int], value: float) -> Tensor:
    if any(size != 1 for size in shape) or not isinstance(value, int | float):
        raise ValueError(f"one number of shape {shape} cannot be {value!r}")
    return torch.full(shape, value, dtype=_dtype(dtype))


def _weight(how: Mapping[str, Any], state: dict[str, Tensor], packed: dict[str, Tensor]) -> Tensor:
    """A weight from the codes of its parts; their zero points go into ``state``."""
    shape, rows, done = how["shape"], [], 0
    for layer, start, stop, bits in how["codes"]:
        scale, zero_point = _grid(layer)
        count = state[scale].numel()
        if start != done or not 2 <= bits <= MAX_BITS or count not in (1, stop - start):
            raise ValueError(f"the weight of {layer} has rows {start} to {stop} of {bits} bits with {count} scales")
        codes, size = packed.pop(f"{layer}.weight_fake_quant.codes"), (stop - start, *shape[1:])
        part, state[zero_point] = _decoded(codes, bits, size, state[scale], _dtype(how["dtype"]))
        rows.append(part)
        done = stop
    if done != shape[0]:
        raise ValueError(f"a weight of shape {shape} has codes of {done} rows")
    return torch.cat(rows)


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"unknown dtype {name!r}; allowed: {', '.join(_DTYPES)}")
    return _DTYPES[name]
