# SPDX-License-Identifier: Apache-2.0
"""A forward never waits for a GPU to tell it a mode; whoever writes the buffers of the modes is followed."""

import copy
import pickle

import pytest
import torch
from torch.ao.quantization import disable_fake_quant, enable_fake_quant, enable_observer
from torch.utils._python_dispatch import TorchDispatchMode

from ahcq_plugin.mqbench import quantizers as mqbench
from ahcq_plugin.quantizers import ACTIVATION_FAMILIES, AdaRoundFakeQuantize, UniformFakeQuantize

FAMILIES = {**ACTIVATION_FAMILIES, AdaRoundFakeQuantize.family: AdaRoundFakeQuantize}
FAMILIES |= {f"mqbench_{name}": family for name, family in mqbench.FAMILIES.items()}
WAITS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero"}


class Waits(TorchDispatchMode):
    """Counts the operations that bring a number from a GPU to Python. Of numbers that nobody has, it gives 1."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in WAITS:
            self.count += 1
            return 1
        return func(*args, **kwargs or {})


@pytest.fixture
def elsewhere():
    """Tensors without values: like those on a GPU, they cannot be looked at from here."""
    with torch.device("meta"):
        yield


def evaluate(quantizer, x):
    quantizer(x)


def learn(quantizer, x):
    quantizer.prob = 0.5
    if isinstance(quantizer, AdaRoundFakeQuantize):
        quantizer.init(x.detach())
    else:
        quantizer.scale.requires_grad_()
    with Waits() as waits:
        quantizer(x).sum().backward()
    assert waits.count == 0


def observe_nothing(quantizer, x):
    quantizer.enable_fake_quant(False)
    assert quantizer(x) is x


def frozen(quantizer, x):
    learn(quantizer, x)
    quantizer.prob = 1.0
    if isinstance(quantizer, AdaRoundFakeQuantize):
        quantizer.adaround = False


@pytest.mark.parametrize("before", [evaluate, learn, frozen, observe_nothing], ids=lambda f: f.__name__)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_forward_waits_for_no_gpu(family, before, elsewhere):
    quantizer = family(quant_max=15)
    quantizer.enable_fake_quant()
    x = torch.rand(4, 6, requires_grad=True)
    before(quantizer, x)
    with Waits() as waits:
        assert quantizer(x).device.type == "meta"
    assert waits.count == 0


def modes(quantizer):
    return quantizer.observing, quantizer.quantizing, quantizer.prob


def test_a_loaded_state_is_looked_at_once(elsewhere):
    quantizer = UniformFakeQuantize(quant_max=15)
    state = UniformFakeQuantize(quant_max=15).state_dict()
    with Waits() as waits:
        modes(quantizer)
        quantizer.load_state_dict(state)
        assert waits.count == 0
        for _ in range(2):
            modes(quantizer)
            assert waits.count == 3


def writes():
    def by_index(quantizer):
        quantizer.fake_quant_enabled[0] = 1
        quantizer.observer_enabled[0] = 1
        quantizer.drop_keep[0] = 0.5

    def in_place(quantizer):
        for buffer, value in ((quantizer.fake_quant_enabled, 1), (quantizer.observer_enabled, 1)):
            buffer.fill_(value)
        quantizer.drop_keep.copy_(torch.tensor([0.5]))

    def in_inference_mode(quantizer):
        with torch.inference_mode():
            by_index(quantizer)

    def another_tensor(quantizer):
        quantizer.fake_quant_enabled = torch.tensor([1], dtype=torch.uint8)
        quantizer.observer_enabled = torch.tensor([1], dtype=torch.uint8)
        quantizer.drop_keep = torch.tensor([0.5])

    def through_a_detached_view(quantizer):  # as Workers.copy does
        quantizer.fake_quant_enabled.detach().fill_(1)
        quantizer.observer_enabled.detach().fill_(1)
        quantizer.drop_keep.detach().fill_(0.5)

    def of_torch_ao(quantizer):
        quantizer.apply(enable_fake_quant)
        quantizer.apply(enable_observer)
        quantizer.prob = 0.5

    def from_a_state(assign):
        def write(quantizer):
            other = UniformFakeQuantize(quant_max=15)
            of_torch_ao(other)
            quantizer.load_state_dict(other.state_dict(), assign=assign)

        return write

    yield from (by_index, in_place, in_inference_mode, another_tensor, through_a_detached_view, of_torch_ao)
    yield from (from_a_state(False), from_a_state(True))


@pytest.mark.parametrize("write", list(writes()), ids=lambda f: f.__qualname__.split(".")[-1])
def test_whoever_writes_the_buffers_is_followed(write):
    quantizer = UniformFakeQuantize(quant_max=15)
    assert modes(quantizer) == (False, False, 1.0)
    write(quantizer)
    assert modes(quantizer) == (True, True, 0.5)
    quantizer.enable_fake_quant(False)
    quantizer.disable_observer()
    quantizer.prob = 1.0
    assert modes(quantizer) == (False, False, 1.0)
    state = quantizer.state_dict()
    assert [int(state[name]) for name in ("observer_enabled", "fake_quant_enabled", "drop_keep")] == [0, 0, 1]


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["deepcopy", "pickle"])
def test_a_copy_has_modes_of_its_own(twin):
    quantizer = UniformFakeQuantize(quant_max=15)
    assert modes(quantizer) == (False, False, 1.0)
    quantizer.fake_quant_enabled[0] = 1  # not looked at before the copy
    other = twin(quantizer)
    assert modes(other) == (False, True, 1.0)
    other.apply(disable_fake_quant)
    assert modes(quantizer) == (False, True, 1.0) and modes(other) == (False, False, 1.0)


def test_a_share_is_the_one_that_the_buffer_holds():
    quantizer = UniformFakeQuantize(quant_max=15)
    quantizer.prob = 0.3
    assert quantizer.prob == float(quantizer.drop_keep) != 0.3
    quantizer.half().prob = 0.3
    assert quantizer.prob == float(torch.tensor(0.3).half())


def test_modes_made_in_inference_mode():
    with torch.inference_mode():
        quantizer = UniformFakeQuantize(quant_max=15)
        quantizer.fake_quant_enabled[0] = 1
        assert modes(quantizer) == (False, True, 1.0)
        quantizer.prob = 0.5
        assert modes(quantizer) == (False, True, 0.5)


def test_a_state_that_nobody_has_looked_at_is_not_compiled():
    quantizer = UniformFakeQuantize(quant_max=15)
    quantizer.load_state_dict(UniformFakeQuantize(quant_max=15).state_dict())
    with pytest.raises(Exception, match="self.quantizing"):  # dynamo keeps the line, not the message
        torch.export.export(quantizer, (torch.ones(3),))
    quantizer.look()
    assert torch.equal(torch.export.export(quantizer, (torch.ones(3),)).module()(torch.ones(3)), torch.ones(3))
