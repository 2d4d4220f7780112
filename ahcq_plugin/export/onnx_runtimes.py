# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs in onnxruntime and in OpenVINO, on the CPU, behind one function."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Graph = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]
RUNTIMES = ("onnxruntime", "openvino")


def open_graph(path: str | Path, runtime: str = "onnxruntime", threads: int = 0, precision: str = "f32") -> Graph:
    """A function from the graph's inputs by name to its outputs in their order.

    Args:
        path: the ONNX file; for OpenVINO also its own ``.xml``.
        runtime: ``onnxruntime`` or ``openvino``; what it does not compute on integers it computes in float32.
        threads: within an operator; 0: as many as the runtime likes.
        precision: for OpenVINO, ``bf16`` allows it bfloat16 in the place of float32, where the processor has it.

    Raises:
        ValueError: another runtime, or a graph that OpenVINO does not take.
        ModuleNotFoundError: the runtime is not installed.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"`runtime` must be one of {', '.join(RUNTIMES)}, got {runtime!r}")
    if importlib.util.find_spec(runtime) is None:
        extra = "onnx" if runtime == "onnxruntime" else runtime
        raise ModuleNotFoundError(f"{runtime} is not installed: pip install 'ahcq_plugin[{extra}]'")
    return _onnxruntime(str(path), threads) if runtime == "onnxruntime" else _openvino(str(path), threads, precision)


def _onnxruntime(path: str, threads: int) -> Graph:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes derive from Exception alone
        raise ValueError(f"onnxruntime does not take {path} ({' '.join(str(error).split()):.200})") from error
    return lambda inputs: session.run(None, dict(inputs))


def _openvino(path: str, threads: int, precision: str) -> Graph:
    import openvino

    # without the hint it computes in bfloat16 where the processor has it
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()
    except RuntimeError as error:
        raise ValueError(
            f"OpenVINO does not take {path} ({str(error).strip().splitlines()[-1]}): use style 'deploy', or onnxruntime"
        ) from error

    def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        found = request.infer(dict(inputs))
        return [np.array(found[index]) for index in range(len(found))]  # its memory is used again

    return run
