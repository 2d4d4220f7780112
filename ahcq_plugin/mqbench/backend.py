# SPDX-License-Identifier: Apache-2.0
"""Our backend in MQBench: quantizers by role, read off the graph, as a recipe says."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ahcq_plugin import ptq
from ahcq_plugin.graph import UNIT_KEY, prepared_units
from ahcq_plugin.graph.ops import GraphIndex
from ahcq_plugin.graph.rewrites import expand_fused_attention
from ahcq_plugin.mqbench import quantizers
from ahcq_plugin.ptq.precondition import ConditionReport
from ahcq_plugin.ptq.prepare import recipe_in
from ahcq_plugin.ptq.recipe import Recipe
from ahcq_plugin.quantizers import FakeQuantize
from ahcq_plugin.support.batches import Forward

logger = logging.getLogger(__name__)
#: Key of our backend in MQBench's tables; give it where MQBench wants a BackendType.
AHCQ_BACKEND = "AHCQ"
DEFAULT_RECIPE = "ahcq"
KEYS = ("recipe", "prequant", "leave")
#: ``hook(prepared)`` changes the weights of a module that has its quantizers, before they are calibrated.
PrequantHook = Callable[[fx.GraphModule], Any]


class _ParamsRow(dict):
    """Hands out copies: MQBench writes a caller's extra arguments into the schemes of its table."""

    def __getitem__(self, key: str) -> Any:
        return copy.deepcopy(super().__getitem__(key))


def params_row() -> dict[str, Any]:
    """Our row of MQBench's ``ParamsTable``; bits and families come from the recipe, not from here."""
    from mqbench.scheme import QuantizeScheme

    return _ParamsRow(
        qtype="affine",
        w_qscheme=QuantizeScheme(symmetry=False, per_channel=True, pot_scale=False, bit=4),
        a_qscheme=QuantizeScheme(symmetry=False, per_channel=False, pot_scale=False, bit=4),
        default_weight_quantize=quantizers.AdaRoundFakeQuantize,
        default_act_quantize=quantizers.UniformFakeQuantize,
        default_weight_observer=quantizers.WeightObserver,
        default_act_observer=quantizers.UniformObserver,
    )


def _check_qconfig(qconfig: Any) -> None:
    """ValueError if ``extra_qconfig_dict`` asked for something: with our backend the recipe decides."""
    row = params_row()
    for kind, short, made in (("weight", "w", qconfig.weight), ("act", "a", qconfig.activation)):
        wanted = {"observer": row[f"default_{kind}_observer"], **row[f"{short}_qscheme"].to_observer_params()}
        if made.p.func is not row[f"default_{kind}_quantize"] or made.p.keywords != wanted:
            raise ValueError(
                f"extra_qconfig_dict is not read with backend {AHCQ_BACKEND!r}: say it in the recipe, for example "
                "extra_quantizer_dict={'recipe': {'name': 'ahcq', 'w_bits': 6, 'a_bits': 6}}"
            )


class AHCQModelQuantizer:
    """MQBench's model quantizer for ``AHCQ_BACKEND``; ``extra_quantizer_dict`` has the keys

    - ``recipe``: name or dict, see :class:`ahcq_plugin.ptq.Recipe`; default 'ahcq'.
    - ``prequant``: hooks, called in order as ``hook(prepared)`` once the quantizers are placed; see :class:`ACNR`.
    - ``leave``: names or globs of what may stay in floating point, see :func:`ahcq_plugin.ptq.prepare`.

    Raises:
        ValueError: unknown key, recipe or setting.
    """

    def __init__(self, extra_quantizer_dict: dict[str, Any], extra_fuse_dict: dict[str, Any]):
        unknown = sorted(set(extra_quantizer_dict) - set(KEYS))
        if unknown:
            raise ValueError(
                f"extra_quantizer_dict: unknown key {', '.join(map(repr, unknown))} for backend {AHCQ_BACKEND!r}; "
                f"allowed: {', '.join(KEYS)}. To leave layers out, prepare only the blocks: ahcq_plugin.mqbench.prepare"
            )
        if extra_fuse_dict:
            raise ValueError(f"extra_fuse_dict: backend {AHCQ_BACKEND!r} fuses nothing, got {sorted(extra_fuse_dict)}")
        self.recipe = Recipe.from_config(extra_quantizer_dict.get("recipe", DEFAULT_RECIPE))
        self.prequant: Sequence[PrequantHook] = extra_quantizer_dict.get("prequant", ())
        self.leave = tuple(extra_quantizer_dict.get("leave", ()))
        if callable(self.prequant) or not all(map(callable, self.prequant)):
            raise ValueError(f"extra_quantizer_dict: `prequant` must be a list of functions, got {self.prequant!r}")
        if self.recipe.acnr and "prequant" not in extra_quantizer_dict:
            logger.warning(
                "recipe %r asks for ACNR, which needs data: give extra_quantizer_dict={'prequant': [ACNR(cali_data)]} "
                "or call ACNR(cali_data)(prepared) before calibration",
                self.recipe.name,
            )

    def prepare(self, model: fx.GraphModule, qconfig: Any, is_qat: bool, backend_config: Any, freeze_bn: bool):
        """Place the quantizers in ``model``, in place, and run the prequant hooks."""
        _check_qconfig(qconfig)
        model.meta.setdefault(UNIT_KEY, {"name": type(model).__name__, "placements": []})["leave"] = self.leave
        expand_fused_attention(model.graph)  # has happened already where BlockTracer traced
        ptq.prepare_unit(model, self.recipe, quantizers.FAMILIES, quantizers.AdaRoundFakeQuantize)
        _sizes_from_quantized(model)
        model.meta[UNIT_KEY]["recipe"] = self.recipe.to_dict()
        for hook in self.prequant:
            hook(model)
        return model


def _sizes_from_quantized(model: fx.GraphModule) -> None:
    """Read the size of a quantized tensor behind its quantizer, in place; values do not change.

    MQBench's reconstruction cuts graphs at quantizers; a size read in front of one would be an input that it lacks.
    """
    index = GraphIndex(model, model.graph)
    for node in [n for n in model.graph.nodes if isinstance(index.module(n), FakeQuantize)]:
        source = node.args[0]
        for user in list(source.users):
            if index.is_scalar(user):
                user.replace_input_with(source, node)
    model.graph.lint()
    model.recompile()


def recipe_of(model: nn.Module) -> Recipe:
    """The recipe with which MQBench prepared the units in ``model``.

    Raises:
        ValueError: there is none, or units were prepared with different ones.
    """
    if not any("recipe" in unit.meta[UNIT_KEY] for unit in prepared_units(model).values()):
        raise ValueError(
            f"the model was not prepared for backend {AHCQ_BACKEND!r}: use prepare_by_platform(model, AHCQ_BACKEND, "
            "...) or ahcq_plugin.mqbench.prepare"
        )
    return recipe_in(model)


@dataclass(frozen=True)
class ACNR:
    """Prequant hook: reduces the condition numbers of the Linear weights (AHCQ-SAM, eq. 7-13).

    It calibrates provisionally to see the activations' quantization errors; nothing of that stays. Call it on whatever
    ``forward`` runs: from ``prequant`` on the module being prepared, or yourself on a model with prepared blocks.

    Args:
        cali_data: sequence of calibration items.
        forward: ``callable(model, item)``; default ``model(*item)`` or ``model(**item)``.
    """

    cali_data: Sequence[Any]
    forward: Forward | None = None

    def __call__(self, model: nn.Module) -> list[ConditionReport]:
        """Condition numbers before and after, one line per Linear weight."""
        recipe = dataclasses.replace(recipe_of(model), acnr=True, condiquant=False, big=False)
        reports = ptq.precondition(model, self.cali_data, recipe, self.forward, progress=False)
        for _, quantizer in ptq.quantizers(model):
            quantizer.activation_post_process.reset()  # MQBench's calibration would go on from there
        return reports
