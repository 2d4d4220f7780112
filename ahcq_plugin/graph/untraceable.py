# SPDX-License-Identifier: Apache-2.0
"""Classes whose code ``torch.fx`` cannot follow as it is written, recognised by name: SAM 2's, also in copies of it.

What the tracer does with each is said here and nowhere else; no module of SAM 2 is imported.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

#: Functions of transformers' SAM 2 and EdgeTAM, kept whole: they go another way for one remembered frame than for two.
ROTARY_FUNCTIONS = (
    "apply_rotary_pos_emb_2d",
    "apply_rotary_pos_emb_2d_self_attn",
    "apply_rotary_pos_emb_2d_cross_attn",
)


@dataclass(frozen=True)
class Treatment:
    """How a class is traced.

    Attributes:
        free: arguments that stay free although they have a default (others are fixed to it).
        counts: free arguments for which a test ``> 0`` is taken as true: that path is right for 0 as well.
        fixed: arguments fixed to another value than their default.
        forward: ``forward(tracer, module, *args, **kwargs)``, traced instead of the module's own.
        is_leaf: stays one node.
        is_unit: a unit of its own, whatever lies inside.
        attributes: an instance has all of them; guards against classes that share the name only.
    """

    free: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    forward: Callable[..., Any] | None = None
    is_leaf: bool = False
    is_unit: bool = False
    attributes: tuple[str, ...] = ()


def treatment(module: nn.Module) -> Treatment:
    """How ``module`` is traced: its class's entry, the empty one for all other classes."""
    entry = _TREATMENTS.get(type(module).__name__)
    if entry is None or not all(hasattr(module, name) for name in entry.attributes):
        return Treatment()
    parameters = inspect.signature(type(module).forward).parameters
    return entry if set(parameters) >= {*entry.free, *entry.fixed} else Treatment()


def rotary_attention(
    tracer: fx.Tracer, module: nn.Module, q: Any, k: Any, v: Any, num_k_exclude_rope: Any = 0
) -> fx.Proxy:
    """SAM 2's ``RoPEAttention.forward`` with the rotation as one node; the original branches on sizes and writes into
    views of the keys."""
    pairs = ((module.q_proj, q), (module.k_proj, k), (module.v_proj, v))
    q, k, v = (module._separate_heads(project(x), module.num_heads) for project, x in pairs)
    options = {"theta": float(module.compute_cis.keywords["theta"]), "repeat": bool(module.rope_k_repeat)}
    rotated = tracer.create_proxy("call_function", rotate, (q, k, num_k_exclude_rope), options)
    dropout = module.dropout_p if module.training else 0.0
    context = F.scaled_dot_product_attention(rotated[0], rotated[1], v, dropout_p=dropout)
    return module.out_proj(module._recombine_heads(context))


def rotate(q: Tensor, k: Tensor, unrotated: int, theta: float, repeat: bool) -> tuple[Tensor, Tensor]:
    """Axial rotary position encoding of queries and keys on a square grid.

    Args:
        q: (..., n, width) floats, n a square number, width a multiple of 4.
        k: (..., n * r + unrotated, width).
        unrotated: number of keys at the end that have no position (SAM 2's object pointers).
        theta: base of the frequencies.
        repeat: r may differ from 1: the keys are r grids, one after another.
    Returns:
        q and k rotated, in their dtypes; computed in float32.
    Raises:
        ValueError: n is not square, or the keys do not fit.
    """
    places, keys = q.shape[-2], k.shape[-2] - unrotated
    if math.isqrt(places) ** 2 != places:
        raise ValueError(f"rotary positions need a square grid, got {places} queries")
    if keys < 0 or keys % places or (keys > places and not repeat):
        raise ValueError(f"{keys} keys with a position do not fit a grid of {places}: expected {places} each")
    table = _rotations(places, q.shape[-1], theta, q.device)
    turned = _turn(k[..., :keys, :], table.repeat(keys // places, 1))
    return _turn(q, table), torch.cat([turned, k[..., keys:, :]], dim=-2)


def _turn(x: Tensor, table: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


@lru_cache(maxsize=8)
def _rotations(places: int, width: int, theta: float, device: torch.device) -> Tensor:
    """(places, width / 2) complex64 factors: the first half of the pairs turns with x, the second with y."""
    with torch.inference_mode(False), torch.no_grad():  # whoever needs gradients later must be able to use it
        frequency = 1.0 / theta ** (torch.arange(0, width, 4).float() / width)
        index, side = torch.arange(places), math.isqrt(places)
        angles = [torch.outer(axis.float(), frequency) for axis in (index % side, index // side)]
        # on the CPU whatever the device, as SAM 2 does: sines differ in the last bit between devices
        return torch.cat([torch.polar(torch.ones_like(angle), angle) for angle in angles], dim=-1).to(device)


_TREATMENTS = {
    "MemoryAttentionLayer": Treatment(free=("pos", "query_pos", "num_k_exclude_rope"), counts=("num_k_exclude_rope",)),
    "RoPEAttention": Treatment(
        forward=rotary_attention, attributes=("compute_cis", "rope_k_repeat", "_separate_heads")
    ),
    # SAM 2 applies the sigmoid itself, before it scales the mask
    "MemoryEncoder": Treatment(fixed={"skip_mask_sigmoid": True}, is_unit=True),
    "PositionEmbeddingSine": Treatment(is_leaf=True),
}
