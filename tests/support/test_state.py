# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from ahcq_plugin.support.state import check_state, differences, load_state


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def changed(model, change):
    """Its state in new tensors, ``change`` applied: None leaves a tensor out."""
    state = {name: torch.full_like(value, 7) for name, value in model.state_dict().items()}
    return {name: value for name, value in {**state, **change}.items() if value is not None}


def test_a_state_that_fits_is_loaded(model):
    state = changed(model, {})
    assert differences(model.state_dict(), state) == []
    load_state(model, state, "here")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"0.weight": None}, "0.weight is missing"),
        ({"2.weight": torch.zeros(1)}, "2.weight is not in the model"),
        ({"0.weight": torch.zeros(2, 4)}, "0.weight has shape (2, 4), the model (2, 3)"),
        ({"1.num_batches_tracked": torch.zeros(1)}, "1.num_batches_tracked has shape (1,), the model ()"),
        ({"0.bias": [0.0, 0.0]}, "0.bias is a list, not a tensor"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(model, change, problem):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = changed(model, change)
    assert differences(model.state_dict(), state) == [problem]
    with pytest.raises(ValueError) as caught:
        load_state(model, state, "a.pth", "the detector")
    assert str(caught.value) == f"a.pth does not fit the detector: 1 of 7 tensors differ, first: {problem}"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_many_differences_stay_one_line(model):
    with pytest.raises(ValueError, match=r"^x does not fit the model: 8 of 7 tensors differ, first: ") as caught:
        check_state(model.state_dict(), {"other": torch.zeros(1)}, "x")
    text = str(caught.value)
    assert "\n" not in text and text.count("is missing") == 3


def test_tensors_of_any_shape(model):
    """A state may bring a shape that is known only after calibration."""
    state = changed(model, {"0.weight": torch.zeros(5), "0.bias": torch.zeros(5)})
    assert differences(model.state_dict(), state, {"0.weight"}) == ["0.bias has shape (5,), the model (2,)"]
    assert differences(model.state_dict(), state, {"0.weight", "0.bias"}) == []
