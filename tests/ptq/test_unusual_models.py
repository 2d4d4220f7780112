# SPDX-License-Identifier: Apache-2.0
"""Models and data that are out of the ordinary: they work, or what is wrong is said by name."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from ahcq_plugin import quantize
from ahcq_plugin.graph import UncoveredError, UnitError
from ahcq_plugin.ptq import Recipe, audit, calibrate, freeze, prepare
from ahcq_plugin.ptq.prepared import weight_layers

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([block(), block()]), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def items(count: int = 2) -> list[Tensor]:
    return list(torch.randn(count, 3, 5, WIDTH, generator=torch.Generator().manual_seed(0)))


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(layer)


COMPUTED = {
    "orthogonal": (parametrizations.orthogonal, "weight"),
    "weight norm": (parametrizations.weight_norm, "weight"),
    "spectral norm": (parametrizations.spectral_norm, "weight"),
    "weight norm by hook": (old_weight_norm, "weight"),
    "spectral norm by hook": (torch.nn.utils.spectral_norm, "weight"),
    "pruning": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "weight"),
    "bias": (lambda layer: parametrize.register_parametrization(layer, "bias", nn.Softplus(), unsafe=True), "bias"),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_are_computed_at_every_call_are_refused_by_name(kind):
    change, tensor = COMPUTED[kind]
    model = Net().eval()
    change(model.blocks[1].up)
    message = rf"'blocks.1'.*up: its {tensor} is computed anew at every call.*`remove_parametrizations`.*`leave=`"
    with pytest.raises(UncoveredError, match=message):
        prepare(model, Recipe.from_config("rtn"))
    assert type(model.blocks[0]) is Block, "refused before anything is replaced"
    prepare(model, Recipe.from_config("rtn"), leave=["blocks.1.up"])
    calibrate(model, items(), progress=False)
    report = audit(freeze(model), items()[0])
    assert report.passed, report.problems
    assert "left: up" in [part.name for part in report.coverage.parts]
    assert list(weight_layers(model)) == ["blocks.0.up", "blocks.0.down", "blocks.1.down"]


@pytest.mark.parametrize("kind", ["weight norm by hook", "pruning"])
def test_a_model_that_torch_does_not_copy_is_named(kind):
    model = Net().eval()
    COMPUTED[kind][0](model.head)
    with pytest.raises(ValueError, match=r"cannot be copied: head.weight is computed from parameters.*`prune.remove`"):
        quantize(model, items(), "rtn", progress=False)
    _, report = quantize(model, items(), "rtn", inplace=True, progress=False)
    assert report.audit.passed


def test_parametrized_norms_and_layers_outside_of_units_work():
    model = Net().eval()
    parametrizations.weight_norm(model.head)
    parametrize.register_parametrization(model.blocks[0].norm, "weight", nn.Softplus(), unsafe=True)
    expected = model(items()[0])
    assert torch.equal(prepare(model, Recipe.from_config("rtn"))(items()[0]), expected)


@pytest.mark.parametrize("recipe", ["rtn", "ahcq"])
def test_inference_tensors_as_weights_and_inputs(recipe):
    torch.manual_seed(0)
    plain = Net().eval()
    with torch.inference_mode():
        model, given = Net().eval(), [x.clone() for x in items()]
        model.load_state_dict(plain.state_dict())
    assert all(p.is_inference() for p in model.parameters()) and given[0].is_inference()
    with pytest.raises(ValueError, match="14 parameters were made in torch.inference_mode.*first blocks.0.norm"):
        quantize(model, given, recipe, inplace=True, progress=False)
    made, _ = quantize(model, given, recipe, iterations=3, progress=False)
    expected, _ = quantize(plain, items(), recipe, iterations=3, progress=False)
    for name, value in expected.state_dict().items():
        assert torch.equal(made.state_dict()[name], value), name


@pytest.mark.parametrize("recipe", ["rtn", "qdrop", "ptq4sam", "ahcq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_is_not_finite_is_an_error_that_names_where(recipe, value):
    data = items()
    data[1][0, 0, 0] = value
    at_a_quantizer = UnitError, r"blocks\.0\.\w+_quantizer: the observed (range|values) must be finite"
    error, text = at_a_quantizer if value == float("inf") else (ValueError, r"`batches\[1\]` holds NaN")
    with pytest.raises(error, match=text):
        quantize(Net().eval(), data, recipe, iterations=2, progress=False)


class DictBlock(Block):
    """Passes a size, a flag and None on beside tensors."""

    def forward(self, x: dict) -> dict:
        return {"x": super().forward(x["x"]), "size": x["size"], "count": 3, "last": True, "mask": None}


class DictNet(Net):
    def __init__(self) -> None:
        super().__init__(DictBlock)

    def forward(self, x: Tensor) -> dict:
        state = {"x": x, "size": x.shape[1]}
        for block in self.blocks:
            state = block(state)
        return {**state, "out": self.head(state["x"])}


@pytest.mark.parametrize("recipe", ["rtn", "adaround", "ahcq"])
def test_outputs_may_hold_ints_flags_and_none(recipe):
    """The dict's block is the plain one with more around it: same bits."""
    torch.manual_seed(0)
    model, plain = DictNet().eval(), Net().eval()
    plain.load_state_dict(model.state_dict())
    made, report = quantize(model, items(), recipe, iterations=3, progress=False)
    expected, _ = quantize(plain, items(), recipe, iterations=3, progress=False)
    assert report.audit.passed
    out = made(items()[0])
    assert torch.equal(out["out"], expected(items()[0]))
    assert {key: value for key, value in out.items() if not isinstance(value, Tensor)} == {
        "size": 5,
        "count": 3,
        "last": True,
        "mask": None,
    }
