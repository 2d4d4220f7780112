# SPDX-License-Identifier: Apache-2.0
"""Packed checkpoints, ``quantized.safetensors``: a frozen model at the size that its bits promise; nothing is pickled.

A safetensors file whose one metadata entry, ``ahcq_plugin``, is JSON:

=========== ======================================================================================================
sha256      of the whole file, with zeros for its own 64 digits
format      ``ahcq_plugin.packed/1``
model       what builds the floating-point model: ``{"builder": "sam", "config": ...}``, or null
outside     ``float32`` or ``float16``: how floats outside of the units are stored
recipe      keys and values of the Recipe; ``units``, ``leave``, ``calls``, ``extra`` as in ``quantized.pth``
state       name in the ``state_dict`` -> how it is stored (below); the other tensors are stored under their names
=========== ======================================================================================================

========================== =======================================================================================
``dtype``                  the tensor of that name, to be converted to this type
``[dtype, shape, value]``  one number
``{"bits": b, ...}``       small integers at b bits (``support.packing``), with their dtype and shape
``{"same": name}``         the tensor of another name: a module that is reached by two names
``{"codes": parts, ...}``  a weight, with its dtype and shape. A part is layer, first and last row, bits; the tensor
                           ``<layer>.weight_fake_quant.codes`` has the codes of these rows and then their zero points,
                           packed. A weight is ``(code - zero_point) * scale`` of its row, in float32
========================== =======================================================================================

A frozen quantizer computes nothing with its modes and with what calibration collected (``calibration_state``): the file
has neither. A model that is loaded from it is frozen, its observers are fresh.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from ahcq_plugin.ptq.packed_state import restore, store
from ahcq_plugin.support.files import replacing

FORMAT = "ahcq_plugin.packed/1"
PACKED_FILE = "quantized.safetensors"  # in a run's work dir, beside quantized.pth
OUTSIDE = ("float32", "float16")
_METADATA = "ahcq_plugin"
_HEAD = {"sha256", "format", "model", "outside", "recipe", "units", "leave", "calls", "extra", "state"}
_NO_DIGEST = "0" * 64
# what JSON, torch and the file's library raise for values that are not what was written
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    safetensors.SafetensorError,
)
_DIGEST = re.compile(rb'\\"sha256\\": ?\\"([0-9a-f]{64})\\"')


def write_packed(path: str | Path, model: nn.Module, content: Mapping[str, Any], outside: str) -> None:
    """Write a frozen model atomically; equal models give equal bytes.

    Args:
        content: plain values of ``model``, ``recipe``, ``units``, ``leave``, ``calls``, ``extra``.
        outside: one of ``OUTSIDE``. With ``float32`` all that is stored is read back bit for bit; with ``float16`` all
            but the floats outside of the units, which are rounded to it (tensors of one number are not).
    Raises:
        ValueError: a weight that its codes do not give bit for bit, or a float that float16 cannot hold.
    """
    if outside not in OUTSIDE:
        raise ValueError(f"`outside` must be one of {', '.join(OUTSIDE)}, got {outside!r}")
    state, tensors = store(model, outside)
    head = {"sha256": _NO_DIGEST, "format": FORMAT, **content, "outside": outside, "state": state}
    text = json.dumps(head, allow_nan=False, separators=(",", ":"))
    data = bytearray(safetensors.torch.save(tensors, {_METADATA: text}))
    start, _ = _digest_place(data)
    data[start : start + len(_NO_DIGEST)] = hashlib.sha256(data).hexdigest().encode()
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def is_packed(path: str | Path) -> bool:
    """Whether a file begins as safetensors files do: the length of a JSON object, and its brace."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def read_packed(path: str | Path) -> dict[str, Any]:
    """What ``write_packed`` wrote: the values of its ``content``, and ``state_dict``, tensors on the CPU, without the
    ``calibration_state`` of quantizers.

    Raises:
        ValueError: damage, another format, or content that cannot be right; one line that begins with the path.
    """
    try:
        data = Path(path).read_bytes()
        start, digest = _digest_place(data)
        found = hashlib.sha256(data[:start] + _NO_DIGEST.encode() + data[start + len(_NO_DIGEST) :]).hexdigest()
        if found.encode() != digest:
            raise ValueError(f"its bytes do not match its SHA-256 ({found[:12]}…): copy or download it again")
        length = int.from_bytes(data[:8], "little")
        head = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_METADATA])
        if head.get("format") != FORMAT:
            raise ValueError(f"format {head.get('format')!r}, this version reads {FORMAT!r}")
        if set(head) != _HEAD:
            raise ValueError(f"missing keys {sorted(_HEAD - set(head))}, unknown keys {sorted(set(head) - _HEAD)}")
        for key, kind in (
            ("recipe", dict),
            ("units", list),
            ("leave", list),
            ("calls", dict),
            ("extra", dict),
            ("state", dict),
        ):
            if not isinstance(head[key], kind):
                raise ValueError(f"`{key}` must be of type {kind.__name__}, got {head[key]!r:.60}")
        head["state_dict"] = restore(head.pop("state"), safetensors.torch.load(data))
        return head
    except _DAMAGE as error:
        reason = f"nothing under {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"checkpoint {path} cannot be read: {reason}") from error


def plain(value: Any) -> Any:
    """``value`` for JSON: numbers that are not finite as None, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _digest_place(data: bytes | bytearray) -> tuple[int, bytes]:
    """Where the digest stands in the file, and its digits."""
    length = int.from_bytes(data[:8], "little")
    match = _DIGEST.search(bytes(data[8 : 8 + min(length, len(data))]))
    if match is None:
        raise ValueError(f"it is no {FORMAT} file, or its header is damaged: there is no SHA-256 in it")
    return 8 + match.start(1), match[1]
