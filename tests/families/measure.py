# SPDX-License-Identifier: Apache-2.0
"""What works of one family: quantization, file, spec and ONNX, each measured or with the message that it ends in.

python -m tests.families.measure results timm "transformers:SAM 2"
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from ahcq_plugin import quantize
from ahcq_plugin.api import load_quantized
from ahcq_plugin.export import export_spec
from ahcq_plugin.export.onnx_graphs import export_onnx
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq import Recipe, prepare
from ahcq_plugin.ptq.coverage import IN_UNITS, INTEGERS, OUTSIDE
from ahcq_plugin.support.files import write_json
from tests.families import hugging_face, sams, timm_models
from tests.families.case import Case, Family, equal, pooled_error, relative_error, tensors
from tests.families.controls import controls

FAMILIES = {(f.source, f.name): f for f in (*sams.FAMILIES, *hugging_face.FAMILIES, *timm_models.FAMILIES)}
#: Steps of reconstruction and of what goes before it: shows that they run, not how well.
ITERATIONS = 4
ACNR_STEPS = 10
SAME, W8A8_GOAL = 1e-5, 0.05
#: A value that lies on a boundary of a quantizer may fall to the other side in onnxruntime.
ONNX_GOAL = 0.02
#: Attention as one operation; ``nn.MultiheadAttention`` calls the others.
FUSED_ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention"}


@dataclass
class Result:
    """A row: None is not measured; ``problems`` has what a stage ended in, by the stage's name.

    Attributes:
        installed: '' or why the family's source cannot be imported.
        coverage: kind of ``ptq/coverage.py`` -> share of the weights.
        outside: the parts outside units, largest first.
        off: relative difference with quantizers off: 0 is the same bits.
        fused: whether the model calls attention that is one operation, which units write out: the last bits differ.
        keys_kept: the floating-point ``state_dict``'s names are all there.
        reloads: a loaded file gives the same bits.
        w8a8, w4a4: relative error over all items, the largest of all outputs.
        controls: of ``tests/families/controls.py``, measured where W8A8 is off too much.
        matmuls, left_out: of the spec.
        onnx: units that export, and ``units_of_a_kind``: that were tried, one of every class.
    """

    source: str
    name: str
    versions: dict[str, str]
    installed: str = ""
    parameters: int | None = None
    units: int | None = None
    coverage: dict[str, float] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)
    w8a8: float | None = None
    controls: dict[str, float] = field(default_factory=dict)
    w4a4: float | None = None
    off: float | None = None
    fused: bool = False
    keys_kept: bool | None = None
    reloads: bool | None = None
    matmuls: int | None = None
    left_out: list[str] = field(default_factory=list)
    onnx: int | None = None
    units_of_a_kind: int | None = None
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def passes(self) -> bool:
        """Everything that is asked of a family."""
        errors = ((self.off, SAME if self.fused else 0.0), (self.w8a8, W8A8_GOAL))
        good = all(error is not None and error <= most for error, most in errors)
        return not self.problems and good and bool(self.keys_kept) and bool(self.reloads)

    @property
    def fails(self) -> bool:
        """It could be tried, and something is amiss."""
        return not self.installed and not self.passes


def measure(family: Family) -> Result:
    """Every stage of ``family`` in this environment."""
    result = Result(family.source, family.name, _versions(family))
    try:
        case = family.case()
    except ImportError as error:
        result.installed = str(error)
        return result
    result.parameters = sum(p.numel() for p in case.model.parameters())
    with torch.no_grad(), _Called() as called:
        expected = [case.forward(case.model, item) for item in case.items]
    result.fused = bool(called.names & FUSED_ATTENTION)
    stages = _Stages(result, family, case, expected)
    stages.run("off", stages.off)
    quantized = stages.run("W8A8", stages.rtn)
    if quantized is not None:
        stages.run("spec", lambda: stages.spec(quantized))
        stages.run("ONNX", lambda: stages.onnx(quantized))
    stages.run("W4A4", stages.ahcq)
    return result


@dataclass
class _Stages:
    result: Result
    family: Family
    case: Case
    expected: list[Any]

    def run(self, name: str, stage: Callable[[], Any]) -> Any:
        """What the stage returns; None, and the message noted, when it raises."""
        try:
            return stage()
        except Exception as error:  # noqa: BLE001  (whatever it is, it is the finding)
            text = (str(error).strip() or "no message").splitlines()[0]
            self.result.problems[name] = f"{type(error).__name__}: {text}"
            return None

    def output(self, model: nn.Module) -> Any:
        with torch.no_grad():
            return self.case.forward(model, self.case.items[0])

    def error(self, model: nn.Module) -> float:
        with torch.no_grad():
            return pooled_error([self.case.forward(model, item) for item in self.case.items], self.expected)

    def off(self) -> None:
        """Prepared, nothing quantized: what the model computed before."""
        model = self.family.case().model
        keys = set(model.state_dict())
        prepare(model, Recipe.from_config("ahcq"), leave=self.case.leave, run=self.output)
        self.result.keys_kept = keys <= set(model.state_dict())
        got = self.output(model)
        self.result.off = 0.0 if equal(got, self.expected[0]) else relative_error(got, self.expected[0])

    def rtn(self) -> nn.Module:
        with tempfile.TemporaryDirectory() as folder:
            model, report = quantize(
                self.case.model,
                self.case.items,
                "rtn",
                w_bits=8,
                a_bits=8,
                forward=self.case.forward,
                work_dir=folder,
                leave=self.case.leave,
                progress=False,
            )
            self.result.units = len(prepared_units(model))
            shares = {kind: report.coverage.share(kind) for kind in (INTEGERS, IN_UNITS, OUTSIDE)}
            self.result.coverage = {kind: share or 0.0 for kind, share in shares.items()}
            self.result.outside = [part.name for part in report.coverage.parts if part.kind == OUTSIDE]
            got = self.output(model)
            self.result.w8a8 = self.error(model)
            loaded = self.run(
                "reload", lambda: load_quantized(Path(folder) / "quantized.pth", lambda _: self.family.case().model)
            )
        self.result.reloads = loaded is not None and equal(self.output(loaded), got)
        if self.result.w8a8 > W8A8_GOAL:
            self.result.controls = self.run("controls", lambda: controls(self.family)) or {}
        return model

    def ahcq(self) -> None:
        model, _ = quantize(
            self.case.model,
            self.case.items,
            {"name": "ahcq", "acnr_steps": ACNR_STEPS},
            w_bits=4,
            a_bits=4,
            iterations=ITERATIONS,
            forward=self.case.forward,
            leave=self.case.leave,
            progress=False,
        )
        self.result.w4a4 = self.error(model)

    def spec(self, model: nn.Module) -> None:
        with tempfile.TemporaryDirectory() as folder:
            spec = export_spec(model, folder, self.case.items[0], self.case.forward)
        self.result.matmuls = sum(len(unit.matmuls) for unit in spec.units)
        self.result.left_out = list(spec.left_out)

    def onnx(self, model: nn.Module) -> None:
        """One unit of every class, with the inputs that it gets."""
        kinds = {type(unit).__name__: unit for unit in prepared_units(model).values()}
        calls: dict[str, tuple[tuple, dict[str, Any]]] = {}

        def remember(kind: str) -> Callable[..., None]:
            return lambda unit, args, kwargs: calls.setdefault(kind, (args, kwargs)) and None

        hooks = [
            unit.register_forward_pre_hook(remember(kind), with_kwargs=True, prepend=True)
            for kind, unit in kinds.items()
        ]
        self.output(model)
        for hook in hooks:
            hook.remove()
        self.result.units_of_a_kind, self.result.onnx = len(calls), 0
        for kind, call in calls.items():
            with torch.no_grad():
                one = _OneCall(kinds[kind], *call)
            self.result.onnx += bool(self.run(f"ONNX of {kind}", one.exports))


class _OneCall(nn.Module):
    """A unit as a function of the tensors of one call; all else is as in that call."""

    def __init__(self, unit: nn.Module, args: tuple, kwargs: dict[str, Any]):
        super().__init__()
        self.unit = unit
        self.leaves, self.structure = tree_flatten((args, kwargs))
        self.paths = {path for path, _ in tensors(unit(*args, **kwargs))}  # sizes are tensors too while ONNX is traced

    def forward(self, *given: Tensor) -> list[Tensor]:
        rest = iter(given)
        leaves = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.structure)
        return [tensor for path, tensor in tensors(self.unit(*args, **kwargs)) if path in self.paths]

    @torch.no_grad()
    def exports(self) -> bool:
        """Whether onnxruntime computes from the file what the unit does."""
        import onnxruntime

        given = tuple(leaf for leaf in self.leaves if isinstance(leaf, Tensor))
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(self, f"{folder}/unit.onnx", given)
            session = onnxruntime.InferenceSession(f"{folder}/unit.onnx", providers=["CPUExecutionProvider"])
            feed = {f"given_{i}": value.numpy() for i, value in enumerate(given)}
            read = {entry.name for entry in session.get_inputs()}  # what nothing reads is left out
            got = [torch.from_numpy(out) for out in session.run(None, {k: v for k, v in feed.items() if k in read})]
        error = relative_error(got, self(*given))
        if error > ONNX_GOAL:
            raise ValueError(f"onnxruntime's outputs are {error:.1%} off")
        return True


class _Called(TorchFunctionMode):
    """Names of the functions of torch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def _versions(family: Family) -> dict[str, str]:
    packages = ("torch", "torchvision", family.source)
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # a repository
    return found


if __name__ == "__main__":
    folder, *chosen = sys.argv[1:]
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # what is outside of units and what no spec has is in the results
    for (source, name), family in FAMILIES.items():
        if source in chosen or f"{source}:{name}" in chosen:
            file_name = re.sub("[^A-Za-z0-9.]+", "_", f"{source} {name}").strip("_")
            write_json(asdict(measure(family)), Path(folder) / f"{file_name}.json")
