# SPDX-License-Identifier: Apache-2.0
"""The strict device itself: it computes what the CPU does, refuses what CUDA refuses, and misses no wait."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch.nn import functional as F

from tests.device.strict import counting, load

pytestmark = pytest.mark.slow  # compiles an extension, half a minute
STRICT = "strict"


@pytest.fixture(scope="module", autouse=True)
def device():
    return load()


OPERATORS = {
    "convolution": (lambda x, w, b: F.conv2d(x, w, b, padding=1), (2, 4, 8, 8), (6, 4, 3, 3), (6,)),
    "depthwise": (lambda x, w, b: F.conv2d(x, w, b, groups=4), (2, 4, 8, 8), (4, 1, 3, 3), (4,)),
    "transposed": (lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2), (2, 3, 8, 8), (3, 4, 2, 2), (4,)),
    "linear": (F.linear, (2, 5, 8), (3, 8), (3,)),
    "attention": (F.scaled_dot_product_attention, (2, 2, 5, 4), (2, 2, 6, 4), (2, 2, 6, 4)),
    "norm": (lambda x, w, b: F.layer_norm(x, (8,), w, b), (2, 3, 8), (8,), (8,)),
    "views": (lambda x: x.transpose(1, 2).reshape(2, -1)[:, ::3].unbind(0)[1], (2, 5, 6)),
    "empty slice": (lambda x: torch.cat([x, x[..., 5:, :]], -2), (2, 5, 6)),
    "written in place": (lambda x: (2 * x).add_(1).mul_(x), (3, 4)),
    "resized": (lambda x: F.interpolate(x, size=(5, 7), mode="bilinear"), (2, 3, 8, 8)),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x).conj() * (1 + 2j)), (2, 5, 2)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_values_and_gradients_are_those_of_the_cpu(name) -> None:
    call, *shapes = OPERATORS[name]
    generator = torch.Generator().manual_seed(0)
    values, found = [torch.randn(shape, generator=generator) for shape in shapes], {}
    for device in ("cpu", STRICT):
        inputs = [value.clone().to(device).requires_grad_() for value in values]
        leaves = [torch.nn.Parameter(value.detach().clone()) for value in inputs]
        out = call(*leaves)
        assert out.device.type == device
        out.square().sum().backward()
        found[device] = [out, *(leaf.grad for leaf in leaves)]
    for wanted, mine in zip(found["cpu"], found[STRICT], strict=True):
        torch.testing.assert_close(mine.cpu(), wanted, rtol=1e-5, atol=1e-5)


def test_what_cuda_refuses_is_refused() -> None:
    x = torch.ones(3, 4, device=STRICT)
    for wrong in (
        lambda: x + torch.ones(3, 4),
        lambda: x @ torch.ones(4, 2),
        lambda: torch.cat([x, torch.ones(3, 4)]),
        lambda: x.copy_(torch.ones(3, 4)).add_(torch.ones(3, 4)),
        lambda: torch.rand(3, device=STRICT, generator=torch.Generator()),
        lambda: x.numpy(),
        lambda: F.embedding(torch.tensor([0, 1]), x),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
    assert float((x + torch.tensor(2.0)).sum()) == 36  # a number of the host is no tensor beside it
    assert x[torch.tensor([0, 2])].shape == (2, 4)  # as CUDA: the indices are copied


def test_a_generator_of_the_device_draws_the_cpus_numbers() -> None:
    mine, theirs = torch.Generator(device=STRICT).manual_seed(3), torch.Generator().manual_seed(3)
    state = mine.get_state()
    drawn = torch.rand(5, device=STRICT, generator=mine)
    assert torch.equal(drawn.cpu(), torch.rand(5, generator=theirs))
    mine.set_state(state)
    assert torch.equal(torch.rand(5, device=STRICT, generator=mine).cpu(), drawn.cpu())


def test_waits_and_copies_are_counted() -> None:
    x = torch.arange(4.0, device=STRICT)
    for wait in (lambda: x[0].item(), lambda: bool(x[1] > 0), x.nonzero, x.cpu, lambda: x[x > 1], x.tolist, x.unique):
        with counting() as events:
            wait()
        assert events["wait"] == 1 and events["to device"] == 0, dict(events.operators)
    with counting() as events:
        torch.ones(3).to(STRICT)
        torch.tensor(1.0).to(STRICT)  # a kernel's argument
        torch.zeros(3, device=STRICT)
        (x * 2 + 1).softmax(0).sum()
        copy.deepcopy(x)
    assert (events["wait"], events["to device"]) == (0, 1), dict(events.operators)


def test_memory_is_accounted(device) -> None:
    gc.collect()
    before = device.memory()[0]
    device.reset_peak()
    x = torch.zeros(1000, device=STRICT)
    view, y = x[10:], x + 1
    assert device.memory()[0] - before == 8000
    del x, y
    assert device.memory()[0] - before == 4000 and view.sum().cpu() == 0
    del view
    assert device.memory()[0] == before and device.memory()[1] - before >= 8000
