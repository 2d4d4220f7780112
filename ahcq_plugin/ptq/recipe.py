# SPDX-License-Identifier: Apache-2.0
"""A recipe says which quantizer each role gets and what reconstruction learns. Frozen, checked on construction."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ahcq_plugin.graph import ROLES
from ahcq_plugin.quantizers import ACTIVATION_FAMILIES

GRANULARITIES = ("none", "layer", "unit")
CACHE_DEVICES = ("cpu", "cuda", "disk")

PRESETS: dict[str, dict[str, Any]] = {
    # Round to nearest on the searched ranges; nothing is learned.
    "rtn": dict(granularity="none"),
    # Nagel et al. 2020: rounding learned layer by layer, activations in floating point meanwhile.
    "adaround": dict(granularity="layer"),
    # Li et al. 2021: rounding learned block by block, activations in floating point meanwhile.
    "brecq": dict(granularity="unit"),
    # Wei et al. 2022: block by block, a random half of the activations quantized; their scales are learned too.
    "qdrop": dict(
        granularity="unit", quantize_activations=True, learn_scales=True, keep_probability=0.5, input_mix=0.5
    ),
}


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
        rounding_lr, scale_lr: Adam learning rates; the rounding's is constant, the scales' follows a cosine to 0 and is
            at most 0.5 % of the scale.
        rounding_weight: factor of the rounding regulariser.
        exponent_start, exponent_end: the regulariser's exponent, linear after the warm-up.
        warmup: share of the iterations without regulariser.
        families: role -> family of its quantizer, for roles that differ from ``uniform``.
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
    families: Mapping[str, str] = field(default_factory=dict)
    share_inputs: bool = True
    cache_device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in PRESETS:
            raise ValueError(f"unknown recipe {self.name!r}; allowed: {', '.join(PRESETS)}")
        for item in dataclasses.fields(self):
            self._check_type(item.name, item.type)
        for role, family in self.families.items():
            for value, allowed in ((role, ROLES), (family, ACTIVATION_FAMILIES)):
                if value not in allowed:
                    raise ValueError(f"recipe: `families` has {value!r}; allowed: {', '.join(allowed)}")
        for key in ("w_bits", "a_bits"):
            if not 2 <= getattr(self, key) <= 8:
                raise ValueError(f"recipe: `{key}` must be in [2, 8], got {getattr(self, key)!r}")
        for key, allowed in (("granularity", GRANULARITIES), ("cache_device", CACHE_DEVICES)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"recipe: `{key}` must be one of {', '.join(allowed)}, got {getattr(self, key)!r}")
        for key in ("iterations", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"recipe: `{key}` must be at least 1, got {getattr(self, key)!r}")
        for key in ("keep_probability", "input_mix", "warmup"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                raise ValueError(f"recipe: `{key}` must be in [0, 1], got {getattr(self, key)!r}")
        for key in ("rounding_lr", "scale_lr", "rounding_weight", "exponent_start", "exponent_end"):
            if not getattr(self, key) > 0:
                raise ValueError(f"recipe: `{key}` must be positive, got {getattr(self, key)!r}")

    def _check_type(self, key: str, kind: str) -> None:
        value = getattr(self, key)
        if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
            object.__setattr__(self, key, float(value))
            return
        expected = {"int": int, "float": float, "bool": bool, "str": str, "Mapping[str, str]": Mapping}[kind]
        if not isinstance(value, expected) or (kind == "int" and isinstance(value, bool)):
            raise ValueError(f"recipe: `{key}` must be of type {kind}, got {value!r}")

    @staticmethod
    def names() -> tuple[str, ...]:
        """Names of the recipes."""
        return tuple(PRESETS)

    @classmethod
    def from_config(cls, config: str | Mapping[str, Any] | Recipe, **overrides: Any) -> Recipe:
        """A recipe from its name or from ``{"name": ..., key: value}``; the name gives the defaults of the other keys.

        Raises:
            ValueError: unknown name or key, or a value out of range.
        """
        if isinstance(config, Recipe):
            return dataclasses.replace(config, **overrides)
        values = {"name": config} if isinstance(config, str) else dict(config)
        values.update(overrides)
        name = values.get("name")
        if name not in PRESETS:
            raise ValueError(f"unknown recipe {name!r}; allowed: {', '.join(PRESETS)}")
        known = {item.name for item in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"recipe: unknown key {', '.join(map(repr, unknown))}; allowed: {', '.join(sorted(known))}"
            )
        return cls(**{**PRESETS[name], **values})

    def family(self, role: str) -> str:
        """Name of the family that quantizes ``role``."""
        return self.families.get(role, "uniform")

    def to_dict(self) -> dict[str, Any]:
        """Plain values; ``Recipe.from_config(recipe.to_dict()) == recipe``."""
        return {
            **{item.name: getattr(self, item.name) for item in dataclasses.fields(self)},
            "families": dict(self.families),
        }
