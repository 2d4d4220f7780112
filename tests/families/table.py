# SPDX-License-Identifier: Apache-2.0
"""docs/models.md from the results of ``measure``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ahcq_plugin.ptq.coverage import INTEGERS, OUTSIDE
from tests.families.controls import ATTENTION, CHOICES, DRAWS, NOISE, RANGES
from tests.families.measure import FAMILIES, ONNX_GOAL, SAME, W8A8_GOAL, Result

#: A control that leaves more than this of an error is no cause of it; noise that reaches it is all of it.
NEARLY_ALL = 0.8
CAUSES = {CHOICES: "other decisions", ATTENTION: "attention weights on an even grid", RANGES: "clipping"}
FIGURES = {
    CHOICES: "with the decisions of floating point",
    ATTENTION: "also with its attention weights",
    RANGES: "also with ranges that hold all values",
    NOISE: f"with those decisions and noise in place of rounding, the largest of {DRAWS} draws",
}

HEAD = f"""# Models

Cut-down models of each family's own classes with random weights, quantized from end to end. Made by
`make test-families`, not by hand; with `PYTHONS="a/bin/python b/bin/python"` it measures in several environments.

- **units**: parts that are quantized; **integers**, **outside**: share of the weights in quantized layers, and outside
  of units, with its largest parts. Cut-down models have more outside than published sizes: heads and embeddings do not
  shrink with the depth.
- **off**: relative difference of the outputs with quantizers off. 0: the same bits. "fused": the model calls attention
  that is one operation; written out, it differs in the last bits (at most {SAME:.0e} passes).
- **W8A8**: relative error over all items, rounding to nearest, the largest of all outputs (at most
  {W8A8_GOAL:.0%} passes). **W4A4**: the same after a few steps of `ahcq`, audited; a random model says little there.
  Where 8 bits are further off, the notes at the end name the cause by controls, one after the other: the model decides
  as in floating point (a decoder that takes the mask with the best predicted IoU may take another one, which is far
  off); attention weights are in floating point, too (of thousands of tokens most get less than half a step of an even
  grid, and all of that is lost; `ahcq` has LNQ for it); ranges hold all values, too (`rtn` takes the mean of the items'
  ranges and clips what is beyond). Beside it noise within half a step of every quantizer in place of its rounding,
  decisions as in floating point: the least that 8 bits can do to this model.
- **file**: `state_dict` keeps the model's names, and a loaded `quantized.pth` gives the same bits.
- **spec**: matmuls exported, and how many are left out. **ONNX**: kinds of units that
  onnxruntime computes alike (a code on a boundary may flip: at most {ONNX_GOAL:.0%}), of all kinds.

| model | source | tested with | units | integers | outside | off | W8A8 | W4A4 | file | spec | ONNX |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def read(folder: Path) -> list[Result]:
    """All results below ``folder``: installed ones of every environment, of the others one."""
    found = [Result(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*/*.json"))]
    order = list(FAMILIES)
    rows = {}
    for result in found:
        key = (result.source, result.name)
        if key in order and not result.installed:
            rows[order.index(key), json.dumps(result.versions)] = result
    seen = {place for place, _ in rows}
    for result in found:
        place = order.index((result.source, result.name)) if (result.source, result.name) in order else None
        if place is not None and place not in seen:
            rows[place, ""] = result
            seen.add(place)
    return [rows[key] for key in sorted(rows)]


def page(results: Sequence[Result]) -> str:
    """The markdown."""
    installed = [result for result in results if not result.installed]
    lines = [_row(result) for result in installed]
    notes = [note for result in installed for note in _notes(result)]
    missing = [f"- {r.source}: {r.name}: {_without_folders(r.installed)}" for r in results if r.installed]
    text = HEAD + "\n".join(lines) + "\n"
    if notes:
        text += "\n## What does not work, and what has no spec\n\n" + "\n".join(notes) + "\n"
    if missing:
        text += "\n## Not installed where this was made\n\n" + "\n".join(missing) + "\n"
    return text


def _row(r: Result) -> str:
    cells = [
        r.name,
        r.source,
        ", ".join(f"{name} {version}" for name, version in r.versions.items() if name != "python"),
        "–" if r.units is None else str(r.units),
        _share(r.coverage.get(INTEGERS)),
        _outside(r),
        "–" if r.off is None else "0" if r.off == 0 else f"{r.off:.0e}" + (" (fused)" if r.fused else ""),
        _error(r.w8a8),
        _error(r.w4a4),
        "yes" if r.keys_kept and r.reloads else "–" if r.reloads is None else "no",
        "–" if r.matmuls is None else f"{r.matmuls}" + (f", {len(r.left_out)} left out" if r.left_out else ""),
        "–" if r.onnx is None else f"{r.onnx} of {r.units_of_a_kind}",
    ]
    return "| " + " | ".join(cells) + " |"


def _notes(r: Result) -> list[str]:
    """One line for each different message, with the stages that it ended."""
    stages: dict[str, list[str]] = {}
    for stage, message in r.problems.items():
        stages.setdefault(_without_folders(message), []).append(stage)
    if r.w8a8 is not None and r.w8a8 > W8A8_GOAL:
        text = f"{r.w8a8:.1%}{_cause(r)}{_controls(r)}"
        stages.setdefault(text, []).append("W8A8")
    if r.off and not r.fused:
        stages.setdefault("other bits, without fused attention", []).append("off")
    if r.left_out:
        reasons = sorted({line.partition(": ")[2] for line in r.left_out})
        stages.setdefault("; ".join(reasons), []).append("left out of the spec")
    source = f"{r.source} {r.versions.get(r.source, '')}".strip()
    return [f"- {source}: {r.name}: {', '.join(s)}: {_escaped(text)}" for text, s in stages.items()]


def _cause(r: Result) -> str:
    """What the controls say of an error above the goal, in one phrase."""
    if r.w8a8 is None or not r.controls:
        return ""
    named, before = [], r.w8a8
    for control, cause in CAUSES.items():
        now = r.controls[control]
        if now < NEARLY_ALL * before:
            named.append(cause)
        before = now
        if now <= W8A8_GOAL and named:
            return ", " + " and ".join(named)
    rounding = before <= r.controls[NOISE] / NEARLY_ALL
    last = "rounding: what 8 bits do to this model" if rounding else "what no control explains"
    return ", " + " and ".join([*named, last])


def _controls(r: Result) -> str:
    figures = [f"{r.controls[name]:.1%} {text}" for name, text in FIGURES.items() if name in r.controls]
    return f" ({'; '.join(figures)})" if figures else ""


def _without_folders(message: str) -> str:
    """Paths of a machine cut down to the package and below it."""
    words = []
    for word in message.split(" "):
        before, slash, rest = word.partition("/")
        if slash and ".py" in rest and not before.strip("('\""):
            parts = rest.split("/")
            start = parts.index("site-packages") + 1 if "site-packages" in parts else max(len(parts) - 3, 0)
            word = before + "/".join(parts[start:])
        words.append(word)
    return " ".join(words)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _outside(r: Result, most: int = 3) -> str:
    names = ", ".join(f"`{name}`" for name in r.outside[:most])
    more = f" and {len(r.outside) - most} more" if len(r.outside) > most else ""
    return _share(r.coverage.get(OUTSIDE)) + (f": {names}{more}" if names else "")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
