# SPDX-License-Identifier: Apache-2.0
"""What the converters of official DETR checkpoints share: reading, shared parameters, COCO's categories, writing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from torch import Tensor, nn

from ahcq_plugin.mm.config_file import read_config
from ahcq_plugin.support.batches import blaming
from ahcq_plugin.support.checked import save_checked
from ahcq_plugin.support.safe_load import safe_load
from ahcq_plugin.support.state import check_state

#: Rows of the official classifiers: COCO's category ids as they are, 0 unused by the decoder.
ROWS = 91
#: COCO's 80 category ids in the order of the labels: 1..90 without ten that were never annotated.
COCO_IDS = tuple(i for i in range(1, ROWS) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
_SHARED = re.compile(r"transformer\.decoder\.((?:class|bbox)_embed\..*)")
Rules = Sequence[tuple[str, str | Callable[[re.Match], str]]]


def build_detector(config: str | Path, kind: str) -> nn.Module:
    """The detector of a config file, with random weights.

    Raises:
        FileNotFoundError, ValueError: no such file; another detector than ``kind``.
    """
    register_all_modules(init_default_scope=True)
    return built(config, kind)


def built(config: str | Path, kind: str) -> nn.Module:
    """The model of the class ``kind`` of a config file. Raises: as ``build_detector``."""
    model = read_config(config).get("model") or {}
    if model.get("type") != kind:
        raise ValueError(f"{config} has the detector {model.get('type')}; expected {kind}")
    with blaming(f"the detector of {config} does not build"):
        return MODELS.build(model).eval()


def read_checkpoint(path: str | Path, official: str) -> dict[str, Tensor]:
    """Official state dict of a file; ``official`` says of which detector, for messages.

    Raises FileNotFoundError, and ValueError when it is no such file.
    """
    content = safe_load(path, legacy=True)  # leaves out the arguments of its training
    state = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} has no state dict under 'model': not an official {official} checkpoint")
    return dict(state)


def renamed(name: str, rules: Rules) -> str | None:
    """``name`` with its beginning replaced by the first rule that matches it; None: no rule does."""
    for pattern, replacement in rules:
        new, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return new
    return None


def shared_with(name: str, value: Tensor, official: Mapping[str, Tensor]) -> str | None:
    """Name under which a decoder's parameter stands once more; None: it stands there once.

    Raises:
        ValueError: the two differ.
    """
    shared = _SHARED.fullmatch(name)
    if shared is None:
        return None
    own = official.get(shared[1])
    if own is None or not (own is value or torch.equal(own, value)):
        raise ValueError(f"{name} differs from {shared[1]}, with which it is shared")
    return shared[1]


def fit(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state`` in the order of ``model``, with its counters of batches, which official batch norms lack.

    Raises:
        ValueError: parameters are missing, left over or of another shape: another variant than the config's.
    """
    own = model.state_dict()
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    state = {**counters, **state}
    check_state(own, state, "the checkpoint", "the config")
    return {name: state[name] for name in own}


def write_converted(
    state: Mapping[str, Tensor], checkpoint: str | Path, out_path: str | Path, config: str | Path, kind: str
) -> int:
    """Write ``state``, made of ``checkpoint``, as one for the detector ``kind`` of ``config``.

    Returns: number of its tensors. Raises: as ``build_detector`` and ``fit``.
    """
    fitting = fit(state, build_detector(config, kind))
    fitting = {name: value.clone() for name, value in fitting.items()}  # rows of a view would be saved with the whole
    meta = {"source": Path(checkpoint).name, "config": Path(config).name}
    save_checked({"state_dict": fitting, "meta": meta}, out_path)
    return len(fitting)
