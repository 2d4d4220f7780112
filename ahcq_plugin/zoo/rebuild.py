# SPDX-License-Identifier: Apache-2.0
"""What a model of the zoo was built with, kept on it, so that a file of its quantized form says how to build it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

_ATTRIBUTE = "zoo_model"  # copies of the model keep it


def remember(model: nn.Module, builder: str, config: str | Mapping[str, Any]) -> None:
    """Note on ``model`` that ``builder`` (``sam``, ``sam2``) made it of ``config``, as that builder takes it."""
    setattr(model, _ATTRIBUTE, {"builder": builder, "config": json.loads(json.dumps(config))})


def built_as(model: nn.Module) -> dict[str, Any] | None:
    """Plain values for :func:`rebuild`; None for a model of somebody else."""
    return getattr(model, _ATTRIBUTE, None)


def rebuild(built: Mapping[str, Any]) -> nn.Module:
    """The floating-point model that ``built_as`` describes, with random weights.

    Raises:
        ValueError: an unknown builder, or nothing that it can build.
    """
    if not isinstance(built, Mapping) or set(built) != {"builder", "config"} or built["builder"] not in _BUILDERS:
        raise ValueError(
            f"a model of the zoo has a `builder` ({', '.join(_BUILDERS)}) and a `config`, got {built!r:.120}"
        )
    return _BUILDERS[built["builder"]]()(built["config"], checkpoint=False)


def rebuild_from_state(state: Mapping[str, Tensor]) -> nn.Module:
    """The SAM or SAM 2 of the zoo, with random weights, whose shapes a ``state_dict`` has, quantized or not.

    A SAM 2's size of input is in no shape: it is the published one.

    Raises:
        ValueError: it belongs to none of them.
    """
    if any(name.startswith("image_encoder.trunk.") for name in state):
        from ahcq_plugin.zoo import sam2

        return sam2.build_sam2(sam2.name_of_state(state), checkpoint=False)
    from ahcq_plugin.zoo import sam

    return sam.build_sam(sam.name_of_state(state), checkpoint=False)


def _sam() -> Callable[..., nn.Module]:
    from ahcq_plugin.zoo.sam import build_sam  # here: who reads another model's file needs neither package

    return build_sam


def _sam2() -> Callable[..., nn.Module]:
    from ahcq_plugin.zoo.sam2 import build_sam2

    return build_sam2


_BUILDERS = {"sam": _sam, "sam2": _sam2}
