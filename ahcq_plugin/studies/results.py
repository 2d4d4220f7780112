# SPDX-License-Identifier: Apache-2.0
"""Figures of PTQ runs that differ in recipe, bits or seed: each cached by a hash of what determines it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ahcq_plugin.mm.config_file import load_config, with_options
from ahcq_plugin.mm.launch import launch
from ahcq_plugin.ptq import Recipe
from ahcq_plugin.support.digest import digest
from ahcq_plugin.support.files import read_json, sha256_of, write_json
from ahcq_plugin.support.typed import typed
from ahcq_plugin.zoo.checkpoints import default_checkpoint
from ahcq_plugin.zoo.hard import SAM_TINY_HARD


@dataclass(frozen=True)
class Cell:
    """One run: a recipe at equal bits of weights and activations, further keys of it, a seed.

    ``options``: ((key, value), ...) below ``recipe``, as ``("families.softmax", "agq")``, or of the whole config, as
    ``("test_cfg.calib.tune_images", 256)``. ``config``: instead of the table's.
    """

    recipe: str
    bits: int
    options: tuple[tuple[str, Any], ...] = ()
    seed: int = 0
    config: str | None = None

    @property
    def name(self) -> str:
        """As in ``qdrop_w4a4-hluq-s1``: file and folder name of its figures."""
        parts = [f"{self.recipe}_w{self.bits}a{self.bits}", *([Path(self.config).stem] if self.config else [])]
        for key, value in self.options:
            key, text = key.removeprefix("test_cfg.calib."), "_".join(value) if isinstance(value, tuple) else value
            flag = {True: key, False: f"no_{key}"}.get(value) if isinstance(value, bool) else f"{key}_{text}"
            parts.append(flag.replace(".", "_").replace("*", "").strip("_"))
        return "-".join([*parts, *([f"s{self.seed}"] if self.seed else [])])

    def overrides(self) -> dict[str, Any]:
        """Overrides of the config."""
        common = {"recipe.name": self.recipe, "recipe.w_bits": self.bits, "recipe.a_bits": self.bits}
        own = {key if key.startswith("test_cfg.") else f"recipe.{key}": value for key, value in self.options}
        return common | {"recipe.seed": self.seed} | own


@dataclass(frozen=True)
class _Stored:
    """The file of a cell."""

    key: str
    config: str
    metrics: dict[str, Any]


@dataclass(frozen=True)
class _Figures:
    """Of ``metrics.json``, what tables and pictures show."""

    fp: dict[str, float]
    quantized: dict[str, float]
    stages: dict[str, dict[str, float]]


_FIGURES = [field.name for field in fields(_Figures)]


#: The same few files for all cells of a table; reading one takes longer than all else of a key.
_loaded = functools.cache(load_config)


def cell_key(config: str, cell: Cell) -> str:
    """Hash of recipe, prompts, calibration and the SAM's weights: what a cell's figures depend on in this repository.

    The data are not part of it: figures made on other data belong into another folder.
    """
    config = cell.config or config
    cfg = with_options(deepcopy(_loaded(config)), cell.overrides())
    name, calib = (cfg.get("sam") or {}).get("name"), (cfg.get("test_cfg") or {}).get("calib")
    if not isinstance(name, str) or not cfg.get("test_cfg") or not isinstance(calib or {}, Mapping):
        raise ValueError(f"{config} is no config of a run: it needs a `sam` with a name, and a `test_cfg`")
    loop = {k: v for k, v in cfg.test_cfg.items() if k not in ("cache_dir", "resume", "device")}
    loop["calib"] = {k: v for k, v in loop.get("calib", {}).items() if k not in ("dataset", "tune_dataset")}
    weights = Path(cfg.sam.get("checkpoint") or default_checkpoint(cfg.sam["name"]))
    recipe = Recipe.from_config(cfg.recipe)
    unused = () if recipe.learn_scales else ("scale_lr",)
    content = [
        {k: v for k, v in recipe.to_hash().items() if k not in unused},
        loop,
        dict(cfg.sam),
        sha256_of(weights),
    ]
    if cfg.sam["name"] == "sam_tiny_hard":
        content.append(asdict(SAM_TINY_HARD))
    return digest(json.loads(json.dumps(content, default=str)))


def read_cell(folder: Path, config: str, cell: Cell) -> dict[str, Any] | None:
    """Stored metrics of a cell; None where there are none or they were made with other settings or weights.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / f"{cell.name}.json"
    if not path.is_file():
        return None
    try:
        stored = typed(read_json(path), _Stored, "it")
        typed({key: stored.metrics[key] for key in _FIGURES if key in stored.metrics}, _Figures, "metrics")
    except ValueError as error:
        raise ValueError(f"{path} does not hold figures of a run ({error}); delete it, and it is run again") from None
    return stored.metrics if stored.key == cell_key(config, cell) else None


def fill(
    config: str, folder: Path, work_dir: Path, cells: Iterable[Cell], run: Callable[..., int] = launch
) -> list[str]:
    """Run every cell that has no valid figures, resuming interrupted ones; returns the names of those that failed."""
    failed = []
    for cell in cells:
        if read_cell(folder, config, cell) is not None:
            continue
        key = cell_key(config, cell)
        place = work_dir / f"{cell.name}-{key[:12]}"
        if run(cell.config or config, str(place), cell.overrides(), resume=True) != 0:
            failed.append(cell.name)
            continue
        metrics = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
        write_json({"key": key, "config": cell.config or config, "metrics": metrics}, folder / f"{cell.name}.json")
    return failed
