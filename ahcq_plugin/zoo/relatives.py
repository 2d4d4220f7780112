# SPDX-License-Identifier: Apache-2.0
"""Models by others that are SAM but for one part, by their own packages: HQ-SAM and MobileSAM.

Their modules and the names in their ``state_dict`` stay as published. Where a part is called otherwise than SAM's,
hooks translate, so that everything that runs a SAM runs them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Relative:
    """A model of another package.

    Attributes:
        package: to import; it has a ``sam_model_registry`` as ``segment_anything`` does.
        install: arguments of ``pip install``.
        size: name in that registry.
        adapt: makes the built model callable as a SAM, in place.
    """

    package: str
    install: str
    size: str
    adapt: Callable[[nn.Module], object] = lambda sam: None


def call_as_sam(sam: nn.Module) -> None:
    """HQ-SAM's encoder also gives an early layer's features and its decoder takes them: they travel behind the channels
    of the embedding, (1, C + W, h, w)."""
    sam.image_encoder.register_forward_hook(_pack)
    sam.mask_decoder.register_forward_pre_hook(_unpack, with_kwargs=True)


def _pack(encoder: nn.Module, args: Any, out: tuple[Tensor, list[Tensor]]) -> Tensor:
    embedding, early = out
    return torch.cat([embedding, early[0].permute(0, 3, 1, 2)], dim=1)


def _unpack(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    packed, width = kwargs["image_embeddings"], decoder.transformer_dim
    parts = {"image_embeddings": packed[:, :width], "interm_embeddings": [packed[:, width:].permute(0, 2, 3, 1)]}
    return args, kwargs | parts | {"hq_token_only": False}


#: As ``build_sam`` names them.
RELATIVES = {
    **{
        f"hq_vit_{size}": Relative("segment_anything_hq", "segment-anything-hq timm", f"vit_{size}", call_as_sam)
        for size in "blh"
    },
    "mobile_sam": Relative("mobile_sam", "git+https://github.com/ChaoningZhang/MobileSAM.git timm", "vit_t"),
}


def build_relative(name: str) -> nn.Module:
    """The model ``name`` of :data:`RELATIVES` with random weights.

    Raises:
        ValueError: its package is not installed; the message says how to get it.
    """
    relative = RELATIVES[name]
    try:
        package = importlib.import_module(relative.package)
    except ImportError as error:
        raise ValueError(f"{name!r} needs a package ({error}): pip install {relative.install}") from error
    sam = package.sam_model_registry[relative.size](checkpoint=None)
    relative.adapt(sam)
    return sam.requires_grad_(True)  # HQ-SAM's authors train its own few layers only
