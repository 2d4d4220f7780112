# SPDX-License-Identifier: Apache-2.0
"""A recipe says which quantizer each role gets and what reconstruction learns. Frozen, checked on construction."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ahcq_plugin.graph import ROLES
from ahcq_plugin.ptq.presets import PRESETS
from ahcq_plugin.quantizers import ACTIVATION_FAMILIES, OutputErrorObserver, OwnErrorObserver, PercentileObserver

_CHOICES = {
    "granularity": ("none", "layer", "unit"),
    "cache_device": ("cpu", "cuda", "disk"),
    "acnr_error": ("local", "accumulated"),
}
#: The seed is one of numpy's and torch's generators; the other bounds are beyond any use, and catch slips.
_WHOLE_NUMBERS = {
    "iterations": (1, 10_000_000),
    "batch_size": (1, 100_000),
    "acnr_steps": (1, 1_000_000),
    "tune_steps": (0, 10_000_000),
    "tune_feature_steps": (0, 10_000_000),
    "cag_groups": (0, 65_536),
    "seed": (0, 2**32 - 1),
}
#: Of learning rates, weights of terms and exponents.
_LARGEST = 1e6
_COMPONENTS = {
    "cag": ("qkv_in", "mlp_in", "gated_act"),
    "hluq": ("post_act",),
    "lnq": ("softmax",),
    "agq": ("softmax",),
}

#: Pairs of keys of which one is in force at most.
_EXCLUSIVE = (
    ("lnq", "agq"),
    ("acnr", "condiquant"),
    ("refit", "acnr"),
    ("refit", "condiquant"),
    ("refit", "par"),
    ("per_head", "range_by_output_error"),
)

#: Keys that came later: at these values they do nothing, and hashes leave them out, so that earlier results stay valid.
_LATER = {
    **{"rotate": False, "refit": 0.0, "tune_steps": 0, "tune_lr": 1e-3, "tune_scale_lr": 1e-3},
    **{"quantize_positions": False, "pcc": False, "par": False, "per_head": False},
    **{"center": False, "center_norms": False, "tune_weight_lr": 0.0, "tune_units": []},
    **{"tune_feature_steps": 0, "tune_feature_units": []},
}

#: Keys that have another name now, old -> new. Hashes are made with the old ones: earlier results stay valid.
_RENAMED = {"range_search": "range_by_output_error"}


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized; build it with ``Recipe.from_config``.

    Attributes:
        name: one of ``Recipe.names()``.
        w_bits, a_bits: bits of weights and activations, 2..8.
        granularity: what is reconstructed at a time: ``none``, ``layer`` (each Linear/Conv) or ``unit`` (a block).
        quantize_activations: activations are quantized while the rounding is learned.
        learn_scales: activation scales are learned with the rounding.
        keep_probability: share of activation elements that stay quantized during reconstruction (QDrop; 1: all).
        input_mix: share of a unit's input elements taken from the quantized model, the rest from floating point.
        iterations: optimizer steps per unit (per layer with granularity ``layer``).
        batch_size: items (images) per step.
        rounding_lr, scale_lr: Adam learning rates; the rounding's is constant, the scales' follows a cosine to 0 and
            moves a scale by at most 2 % of itself.
        rounding_weight: factor of the rounding regulariser.
        exponent_start, exponent_end: the regulariser's exponent, linear after the warm-up.
        warmup: share of the iterations without regulariser.
        acnr: reduce the condition numbers of Linear weights before quantization (AHCQ-SAM, eq. 7-13).
        acnr_lambda, acnr_beta, acnr_energy, acnr_steps: its strength, weight of the activation error, share of the
            energy that stays untouched, number of steps.
        acnr_error: the activation error it weighs: ``local`` (of the layer's own floating-point input) or
            ``accumulated`` (against the input in the quantized model).
        condiquant: the isotropic variant instead, a baseline for ACNR (uses acnr_lambda and acnr_steps).
        cag: channels of ``qkv_in`` and ``mlp_in`` in groups (AHCQ-SAM), of ``gated_act`` too: SAM has none; of all
            families it loses least there, and HLUQ gains nothing over ``uniform``.
        cag_groups: number of groups in the end; 0: per channel; with 1 it is a range per tensor.
        hluq: hybrid log-uniform quantizer for ``post_act`` (AHCQ-SAM).
        lnq: logarithmic non-linear quantizer for ``softmax`` (AHCQ-SAM).
        agq: adaptive granularity quantizer for ``softmax`` (PTQ4SAM).
        big: fold the signs of bimodal keys into the projections of queries and keys (PTQ4SAM).
        pcc: uniform quantizers of a decoder's queries, keys and their projections' inputs take the range that keeps the
            focus of attention (``ptq/focus.py``; SAQ-SAM); goes before ``big`` and ``range_by_output_error`` there.
        par: stages of encoder blocks and layers of the decoder learn by how the floating-point decoder responds to at
            most 16 prompts of an item (``ptq/response.py``; SAQ-SAM); with granularity ``unit``.
        per_head: queries, keys and values have a scale and a zero point for each head, where they are uniform.
        rotate: rotate attention heads in the projections of queries and keys, and of values and outputs, where nothing
            that a rotation does not pass through stands between (``ptq/rotate.py``; QuaRot).
        center: what keys and values share goes into biases, where they are a Linear's output (``ptq/center.py``).
        center_norms: so do the middles of the channels of a two-way decoder's LayerNorms (``ptq/center_norms.py``).
        range_by_output_error: uniform and HLUQ activation quantizers search their range by the error of the product
            behind the tensor, instead of taking the mean minimum and maximum of the published methods.
        refit: 0, or how strongly a layer's new weight and bias are held to the old ones, as a share of the mean square
            of its inputs, when Linears are fitted to their quantized inputs before their rounding is learned
            (``ptq/refit.py``; in place of acnr; ERQ).
        tune_steps: 0, or optimizer steps in which activation scales, biases and norms of the frozen model learn by the
            error of the model's output (``ptq/tune.py``).
        tune_units: globs of the units that learn then; none: all. Units that these do not act on run once for an item.
        tune_feature_steps, tune_feature_units: as many steps before these, in which the units of these globs (an image
            encoder's) learn by the error of what they give to the rest of the model (``ptq/features.py``).
        tune_lr, tune_scale_lr: Adam learning rates of biases and norms, and of activation scales, in these steps; both
            follow a cosine to 0, and a scale moves by at most 2 % of itself.
        tune_weight_lr: 0, or the learning rate of weights in these steps, as a share of the step of their grid.
        without: one of ``cag``, ``hluq``, ``lnq``, ``agq`` -> globs of the units that do without it.
        families: role -> family of its quantizer; goes before all of the above.
        quantize_positions: tables of relative positions are quantized like weights, and multiplied with the codes of
            queries (``ptq/positions.py``): SAM's ``add_decomposed_rel_pos``. False: they stay in floating point.
        share_inputs: Linears fed by one tensor share one activation quantizer.
        cache_device: where the units' inputs and outputs are kept: ``cpu``, ``cuda`` or ``disk`` (under the work dir).
        seed: of everything random in reconstruction.
    """

    name: str
    w_bits: int = 4
    a_bits: int = 4
    granularity: str = "none"
    quantize_activations: bool = False
    learn_scales: bool = False
    keep_probability: float = 1.0
    input_mix: float = 1.0
    iterations: int = 20000
    batch_size: int = 1
    rounding_lr: float = 1e-3
    scale_lr: float = 4e-5
    rounding_weight: float = 0.01
    exponent_start: float = 20.0
    exponent_end: float = 2.0
    warmup: float = 0.2
    acnr: bool = False
    acnr_lambda: float = 0.003
    acnr_beta: float = 0.001
    acnr_energy: float = 0.8
    acnr_steps: int = 200
    acnr_error: str = "local"
    condiquant: bool = False
    cag: bool = False
    cag_groups: int = 4
    hluq: bool = False
    lnq: bool = False
    agq: bool = False
    big: bool = False
    range_by_output_error: bool = False
    pcc: bool = False
    par: bool = False
    per_head: bool = False
    rotate: bool = False
    center: bool = False
    center_norms: bool = False
    refit: float = 0.0
    tune_steps: int = 0
    tune_lr: float = 1e-3
    tune_scale_lr: float = 1e-3
    tune_weight_lr: float = 0.0
    tune_units: Sequence[str] = ()
    tune_feature_steps: int = 0
    tune_feature_units: Sequence[str] = ()
    without: Mapping[str, Sequence[str]] = field(default_factory=dict)
    families: Mapping[str, str] = field(default_factory=dict)
    quantize_positions: bool = False
    share_inputs: bool = True
    cache_device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in PRESETS:
            raise ValueError(f"unknown recipe {self.name!r}; allowed: {', '.join(PRESETS)}")
        for item in dataclasses.fields(self):
            assert isinstance(item.type, str)  # as written above: this file does not evaluate its annotations
            self._check_type(item.name, item.type)
        for role, family in self.families.items():
            for value, allowed in ((role, ROLES), (family, ACTIVATION_FAMILIES)):
                if not isinstance(value, str) or value not in allowed:
                    raise ValueError(f"recipe: `families` has {value!r}; allowed: {', '.join(allowed)}")
        self._check_without()
        for key in ("w_bits", "a_bits"):
            if not 2 <= getattr(self, key) <= 8:
                raise ValueError(f"recipe: `{key}` must be in [2, 8], got {getattr(self, key)!r}")
        for key, allowed in _CHOICES.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"recipe: `{key}` must be one of {', '.join(allowed)}, got {getattr(self, key)!r}")
        for key, (least, most) in _WHOLE_NUMBERS.items():
            if not least <= getattr(self, key) <= most:
                raise ValueError(f"recipe: `{key}` must be in [{least}, {most}], got {getattr(self, key)!r}")
        for one, other in _EXCLUSIVE:
            if getattr(self, one) and getattr(self, other):
                raise ValueError(f"recipe: `{one}` and `{other}` exclude each other; set one of them to False or 0")
        for key in ("keep_probability", "input_mix", "warmup", "acnr_energy"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                raise ValueError(f"recipe: `{key}` must be in [0, 1], got {getattr(self, key)!r}")
        for key in ("refit", "par"):
            if getattr(self, key) and self.granularity == "layer":
                raise ValueError(
                    f"recipe: `{key}` needs the granularity `unit` or `none`, got 'layer'; set one of the two"
                )
        for key in ("acnr_beta", "refit", "tune_weight_lr"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"recipe: `{key}` must not be negative, got {getattr(self, key)!r}")
        rates = ("rounding_lr", "scale_lr", "tune_lr", "tune_scale_lr")
        for key in (*rates, "rounding_weight", "exponent_start", "exponent_end", "acnr_lambda"):
            if not getattr(self, key) > 0:
                raise ValueError(f"recipe: `{key}` must be positive, got {getattr(self, key)!r}")
        for item in dataclasses.fields(self):
            if item.type == "float" and getattr(self, item.name) > _LARGEST:
                raise ValueError(
                    f"recipe: `{item.name}` must be at most {_LARGEST:g}, got {getattr(self, item.name)!r}"
                )
        if self.tune_feature_steps and not self.tune_feature_units:
            raise ValueError("recipe: `tune_feature_steps` needs `tune_feature_units`, such as ['image_encoder.*']")
        if self.exponent_end > self.exponent_start:
            raise ValueError(
                f"recipe: the exponent falls from `exponent_start` to `exponent_end`, got {self.exponent_start!r} and "
                f"{self.exponent_end!r}"
            )

    def _check_type(self, key: str, kind: str) -> None:
        value = getattr(self, key)
        if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
            object.__setattr__(self, key, float(value))
            return
        if kind == "Sequence[str]":
            _check_globs(key, value)
            object.__setattr__(self, key, tuple(value))
            return
        expected = {"int": int, "float": float, "bool": bool, "str": str}.get(kind, Mapping)
        if not isinstance(value, expected) or (kind == "int" and isinstance(value, bool)):
            raise ValueError(f"recipe: `{key}` must be of type {kind}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"recipe: `{key}` must be finite, got {value!r}")

    def _check_without(self) -> None:
        for component, globs in self.without.items():
            if component not in _COMPONENTS:
                raise ValueError(f"recipe: `without` has {component!r}; allowed: {', '.join(_COMPONENTS)}")
            _check_globs(f"without.{component}", globs)
        object.__setattr__(self, "without", {component: list(globs) for component, globs in self.without.items()})

    def check_machine(self) -> None:
        """ValueError where ``cache_device`` is a GPU and this machine has none."""
        if self.cache_device == "cuda" and not torch.cuda.is_available():
            raise ValueError("recipe: `cache_device` is 'cuda', and this machine has no GPU: use 'cpu' or 'disk'")

    def check_channels(self, most: int, whose: str) -> None:
        """ValueError where channels cannot make as many groups as ``cag_groups`` says."""
        if self.cag and self.cag_groups > most:
            raise ValueError(
                f"recipe: `cag_groups` is {self.cag_groups}, {whose} has {most} channels; 0 keeps every channel apart"
            )

    def check_globs(self, names: Sequence[str], what: str) -> None:
        """ValueError for a glob (of ``without``, ``tune_units``, ``tune_feature_units``) that matches none of
        ``names``, which are ``what``.

        Globs of a preset may be of another model's parts; those of a user should match something in this one.
        """
        usual = Recipe.from_config(self.name)
        given = {f"without.{part}": (globs, usual.without.get(part, ())) for part, globs in self.without.items()}
        given |= {key: (getattr(self, key), getattr(usual, key)) for key in ("tune_units", "tune_feature_units")}
        for key, (globs, preset) in given.items():
            for glob in globs:
                if glob not in preset and not fnmatch.filter(names, glob):
                    raise ValueError(
                        f"recipe: `{key}` has {glob!r}, which matches none of the {len(names)} {what}, as {names[0]!r}"
                    )

    @staticmethod
    def names() -> tuple[str, ...]:
        """Names of the recipes."""
        return tuple(PRESETS)

    @classmethod
    def from_config(cls, config: str | Mapping[str, Any] | Recipe, **overrides: Any) -> Recipe:
        """A recipe from its name or from ``{"name": ..., key: value}``; the name gives the defaults of the other keys.

        Keys under their former names (``range_search``) are taken with a FutureWarning.

        Raises:
            ValueError: unknown name or key, a key under both its names, or a value out of range.
        """
        if isinstance(config, Recipe):
            values = overrides
        elif not isinstance(config, (str, Mapping)):
            raise TypeError(f"a recipe is a name, a dict or a Recipe, got {config!r:.60}")
        else:
            values = {**({"name": config} if isinstance(config, str) else config), **overrides}
        for old in _RENAMED.keys() & values.keys():
            warnings.warn(f"recipe: `{old}` is called `{_RENAMED[old]}` now", FutureWarning, stacklevel=2)
        values = current_names(values)
        if isinstance(config, Recipe):
            return dataclasses.replace(config, **values)
        name = values.get("name")
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"unknown recipe {name!r}; allowed: {', '.join(PRESETS)}")
        known = {item.name for item in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known, key=str)
        if unknown:
            raise ValueError(
                f"recipe: unknown key {', '.join(map(repr, unknown))}; allowed: {', '.join(sorted(known))}"
            )
        return cls(**{**PRESETS[name], **values})

    def family(self, role: str, unit: str = "") -> str:
        """Name of the family that quantizes ``role`` in the unit of that name."""
        chosen = (name for name, roles in _COMPONENTS.items() if role in roles and self._uses(name, unit))
        return self.families.get(role) or next(chosen, "uniform")

    def _uses(self, component: str, unit: str) -> bool:
        left_out = any(fnmatch.fnmatchcase(unit, glob) for glob in self.without.get(component, ()))
        return getattr(self, component) and not left_out

    def quantizer_options(self, role: str, unit: str = "") -> dict[str, Any]:
        """Further arguments of the quantizer of ``role`` in the unit of that name."""
        family = self.family(role, unit)
        if family == "cag":
            return {"groups": self.cag_groups}
        if family == "hluq":
            return {"search_range": True} if self.range_by_output_error else {}
        if family != "uniform":
            return {}
        options: dict[str, Any] = {"per_head": True} if self.per_head and role in ("q", "k", "v") else {}
        if self.pcc and role in ("qkv_in", "q", "k"):
            options["observer"] = PercentileObserver
        elif self.range_by_output_error:
            options["observer"] = OutputErrorObserver
        elif self.big and role == "k":
            # PTQ4SAM: the keys, of one mode once folded, get the range of the least error of their own
            options["observer"] = OwnErrorObserver
        return options

    def to_dict(self) -> dict[str, Any]:
        """Plain values; ``Recipe.from_config(recipe.to_dict()) == recipe``."""
        return {
            **{item.name: getattr(self, item.name) for item in dataclasses.fields(self)},
            "without": {component: list(globs) for component, globs in self.without.items()},
            "families": dict(self.families),
            "tune_units": list(self.tune_units),
            "tune_feature_units": list(self.tune_feature_units),
        }

    @property
    def tunes(self) -> bool:
        """Whether anything learns after freezing."""
        return bool(self.tune_steps or self.tune_feature_steps)

    def of_features(self) -> Recipe:
        """The recipe whose ``tune_steps`` are this one's ``tune_feature_steps``."""
        steps, units = self.tune_feature_steps, self.tune_feature_units
        return dataclasses.replace(
            self, tune_steps=steps, tune_units=units, tune_feature_steps=0, tune_feature_units=()
        )

    def to_hash(self) -> dict[str, Any]:
        """``to_dict`` under the names that the keys had first, without those that came later and do nothing: for hashes
        that earlier results carry."""
        first_names = {new: old for old, new in _RENAMED.items()}
        values = {key: value for key, value in self.to_dict().items() if key not in _LATER or value != _LATER[key]}
        return {first_names.get(key, key): value for key, value in values.items()}


def _check_globs(key: str, globs: Any) -> None:
    if not isinstance(globs, (list, tuple)) or not all(isinstance(glob, str) for glob in globs):
        raise ValueError(f"recipe: `{key}` must be a list of globs of units, got {globs!r}")


def check_recipe(recipe: Any) -> None:
    """TypeError for anything but a Recipe."""
    if not isinstance(recipe, Recipe):
        raise TypeError(f"`recipe` must be a Recipe, got {recipe!r:.60}: make one with Recipe.from_config")


def current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's keys and values, of a file for example, with keys of former names under their names of today.

    Raises:
        ValueError: a key is there under both its names.
    """
    both = [(old, new) for old, new in _RENAMED.items() if old in values and new in values]
    if both:
        old, new = both[0]
        raise ValueError(f"recipe: `{old}` is the former name of `{new}`; give `{new}` alone")
    return {_RENAMED.get(key, key): value for key, value in values.items()}
