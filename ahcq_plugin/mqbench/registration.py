# SPDX-License-Identifier: Apache-2.0
"""Put our names into MQBench's tables."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch.jit import TracerWarning

from ahcq_plugin.mqbench.backend import AHCQ_BACKEND, AHCQModelQuantizer, params_row
from ahcq_plugin.mqbench.onnx_form import check_exportable, drop_fixed_arguments
from ahcq_plugin.mqbench.quantizers import FAKE_QUANTIZERS, OBSERVERS


def deploy_check(model: Any, **_: Any) -> None:
    """First step of ``convert_deploy``, on its copy of the model: refuse what ONNX cannot express."""
    check_exportable(model)
    drop_fixed_arguments(model)


def deploy_onnx(model: Any, **options: Any) -> None:
    """Second step of ``convert_deploy``: MQBench's own ONNX export."""
    from mqbench.convert_deploy import convert_onnx

    with warnings.catch_warnings():  # the modes of our quantizers are tensors, and fixed by now
        warnings.simplefilter("ignore", TracerWarning)
        convert_onnx(model, **options)


def _import_tables() -> dict[str, dict]:
    try:
        from mqbench.prepare_by_platform import FakeQuantizeDict, ObserverDict, ParamsTable
        from mqbench.utils.registry import BACKEND_DEPLOY_FUNCTION, DEFAULT_MODEL_QUANTIZER
    except ImportError as error:
        raise ImportError(
            f"MQBench does not import ({error}): install it with `pip install '.[mqbench]'` in a checkout of "
            "ahcq_plugin, beside torch 2.5.1 (MQBench does not import on much newer ones); see docs/mqbench.md"
        ) from error
    return {
        "ObserverDict": ObserverDict,
        "FakeQuantizeDict": FakeQuantizeDict,
        "ParamsTable": ParamsTable,
        "DEFAULT_MODEL_QUANTIZER": DEFAULT_MODEL_QUANTIZER,
        "BACKEND_DEPLOY_FUNCTION": BACKEND_DEPLOY_FUNCTION,
    }


def register() -> None:
    """Add our observers, fake quantizers and backend to MQBench's tables; calling it again changes nothing.

    Raises:
        ImportError: MQBench is not there or does not import.
        KeyError: one of the names is taken by somebody else; nothing is added then.
    """
    tables = _import_tables()
    row = params_row()
    entries: dict[str, dict[Any, Any]] = {
        "ObserverDict": OBSERVERS,
        "FakeQuantizeDict": FAKE_QUANTIZERS,
        "ParamsTable": {AHCQ_BACKEND: row},
        "DEFAULT_MODEL_QUANTIZER": {AHCQ_BACKEND: AHCQModelQuantizer},
        "BACKEND_DEPLOY_FUNCTION": {AHCQ_BACKEND: [deploy_check, deploy_onnx]},
    }
    same: dict[str, Callable[[Any, Any], bool]] = {"ParamsTable": lambda a, b: type(a) is type(b)}
    taken = [
        f"{name!r} in {table} ({_owner(tables[table][name])})"
        for table, ours in entries.items()
        for name, value in ours.items()
        if name in tables[table] and not same.get(table, lambda a, b: a == b)(tables[table][name], value)
    ]
    if taken:
        raise KeyError(f"MQBench has other entries under our names: {', '.join(taken)}; register ahcq_plugin first")
    for table, ours in entries.items():
        for name, value in ours.items():
            tables[table].setdefault(name, value)


def _owner(entry: Any) -> str:
    return getattr(entry, "__module__", type(entry).__name__)
