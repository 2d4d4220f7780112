# SPDX-License-Identifier: Apache-2.0
"""Units called several times per forward, in loops or not."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq import Recipe, calibrate, prepare, reconstruct, set_quantization
from ahcq_plugin.ptq.optimise import optimise
from ahcq_plugin.ptq.reading import Reading, read_units
from ahcq_plugin.ptq.stream import UnitStream


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin1, self.act, self.lin2 = nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lin2(self.act(self.lin1(x)))


class Recurrent(nn.Module):
    """Frames go through ``encode``; ``update`` and ``store`` are a loop over them, ``head`` reads the last state."""

    UNITS = ("encode", "update", "store", "head")

    def __init__(self) -> None:
        super().__init__()
        for name in self.UNITS:
            setattr(self, name, Block())

    def forward(self, frames: Tensor) -> Tensor:
        memory: list[Tensor] = []
        for frame in frames:
            seen = self.encode(frame)
            state = self.update(seen if not memory else torch.cat([seen, torch.cat(memory) * 0.5]))
            stored = self.store(state[: len(seen)])
            stored += 0.25  # as SAM 2 writes to what its memory encoder returned
            memory.append(stored)
        return self.head(memory[-1])


def make_recurrent() -> tuple[nn.Module, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    model = Recurrent().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    items = [torch.randn(frames, 2, 4, generator=generator) for frames in (3, 2)]
    prepare(model, Recipe.from_config("rtn", w_bits=3, a_bits=3), list(Recurrent.UNITS))
    calibrate(model, items, progress=False)
    return model, items


def record_calls(model: nn.Module, item, forward) -> dict[str, list]:
    """The oracle: (args, kwargs, out) of every call of every unit while the whole model runs."""
    seen: dict[str, list] = {}

    def copied(tree):
        return pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, tree)

    handles = [
        unit.register_forward_hook(
            lambda _, args, kwargs, out, name=name: seen.setdefault(name, []).append(copied((args, kwargs, out))),
            with_kwargs=True,
        )
        for name, unit in prepared_units(model).items()
    ]
    with torch.no_grad():
        forward(model, item)
    for handle in handles:
        handle.remove()
    return seen


def assert_same(got, expected) -> None:
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def assert_stream_equals_whole_runs(model: nn.Module, items: list, forward, stream: UnitStream) -> None:
    """Every unit gets what a run of the whole model gives it in which exactly the units before it are quantized."""
    units = prepared_units(model)
    floating = [record_calls(model, item, forward) for item in items]
    for position, name in enumerate(stream.order):
        for number, other in enumerate(stream.order):
            set_quantization(units[other], number < position)
        mixed = [record_calls(model, item, forward) for item in items]
        stream.collect(name)
        assert stream.samples == [(item, call) for item in range(len(items)) for call in range(len(mixed[item][name]))]
        for sample, (item, call) in enumerate(stream.samples):
            assert_same(stream.inputs("quantized", sample), mixed[item][name][call][:2])
            assert_same(stream.inputs("floating", sample), floating[item][name][call][:2])
            assert_same(stream.target(name, sample), floating[item][name][call][2])
        stream.advance(name)


def run(model: nn.Module, item: Tensor) -> Tensor:
    return model(item)


@pytest.mark.parametrize("cache_device", ["cpu", "disk"])
def test_units_in_a_loop_get_the_inputs_of_both_models(tmp_path, cache_device):
    model, items = make_recurrent()
    stream = UnitStream(model, items, run, cache_device, tmp_path)
    assert stream.order == ["encode", "update", "store", "head"]
    assert_stream_equals_whole_runs(model, items, run, stream)
    assert not list(stream._inputs)
    stream.close()
    assert not list(tmp_path.iterdir())


def test_a_forward_in_inference_mode_gives_inputs_that_can_be_learned_from():
    model, items = make_recurrent()

    def inferring(model, item):
        with torch.inference_mode():
            return model(item)

    stream = UnitStream(model, items, inferring)
    for name in stream.order:
        stream.collect(name)
        (x,), _ = stream.inputs("quantized", 0)
        set_quantization(stream.units[name], True)
        stream.units[name](x).sum().backward()
        assert stream.units[name].lin1.weight.grad.abs().sum() > 0
        stream.advance(name)


def test_what_is_read_from_what():
    model, items = make_recurrent()
    reading = read_units(prepared_units(model), lambda: model(items[0]))
    assert reading.calls == {"encode": 3, "update": 3, "store": 3, "head": 1} and reading.repeats
    assert reading.reads == {
        "encode": frozenset(),
        "update": {"encode", "store"},
        "store": {"update"},
        "head": {"store"},
    }
    loop = {"encode", "update", "store"}
    assert reading.behind == {"encode": frozenset(), "update": loop, "store": loop, "head": loop}
    assert reading.settled == {"encode", "head"}
    assert reading.needed(1) == loop and reading.needed(3) == loop and reading.needed(4) == frozenset()


def test_in_a_chain_every_unit_is_settled_and_only_what_follows_is_needed():
    reading = Reading(
        ["a", "b", "c"], {"a": frozenset(), "b": frozenset("a"), "c": frozenset("b")}, dict.fromkeys("abc", 1)
    )
    assert not reading.repeats and reading.settled == set("abc")
    assert [reading.needed(i) for i in range(4)] == [{"a", "b"}, {"a", "b"}, {"b"}, frozenset()]


def test_units_that_do_not_matter_are_not_computed():
    model, items = make_recurrent()
    stream = UnitStream(model, items, run)
    computed = dict.fromkeys(stream.order, 0)
    for name, unit in prepared_units(model).items():
        unit.lin1.register_forward_hook(lambda *_, name=name: computed.__setitem__(name, computed[name] + 1))
    stream.collect("encode")
    assert computed == {"encode": 5, "update": 0, "store": 0, "head": 0}  # its floating-point outputs


def test_a_repeated_call_without_a_loop_is_a_sample_of_its_own(tiny_sam, tiny_items):
    from ahcq_plugin.zoo.sam import box_forward

    def twice(model, item):
        box_forward(model, {**item, "image": -item["image"]})
        return box_forward(model, item)

    prepare(tiny_sam, Recipe.from_config("rtn", w_bits=3, a_bits=3))
    calibrate(tiny_sam, tiny_items, twice, progress=False)
    stream = UnitStream(tiny_sam, tiny_items, twice)
    assert_stream_equals_whole_runs(tiny_sam, tiny_items, twice, stream)
    assert stream._reading.settled == set(stream.order)


def test_reconstruction_learns_from_every_call(monkeypatch):
    model, items = make_recurrent()
    recipe = Recipe.from_config("qdrop", w_bits=3, a_bits=3, iterations=120, rounding_lr=2e-2, scale_lr=1e-3)
    drawn: dict[str, set[int]] = {}

    def watched(module, name, samples, *others):
        def noted(stream, sample):
            drawn.setdefault(name, set()).add(sample)
            return samples.inputs(stream, sample)

        optimise(module, name, dataclasses.replace(samples, inputs=noted), *others)

    monkeypatch.setattr(sys.modules["ahcq_plugin.ptq.reconstruct"], "optimise", watched)
    reports = {report.name: report for report in reconstruct(model, items, recipe, run, progress=False)}
    assert {name: sorted(samples) for name, samples in drawn.items()} == {
        "encode": [0, 1, 2, 3, 4],
        "update": [0, 1, 2, 3, 4],
        "store": [0, 1, 2, 3, 4],
        "head": [0, 1],
    }
    assert all(reports[name].error_after < reports[name].error_before for name in ("encode", "update", "store"))


def test_a_run_that_is_resumed_inside_the_loop_gives_the_same_tensors(tmp_path):
    recipe = Recipe.from_config("qdrop", w_bits=3, a_bits=3, iterations=10, rounding_lr=2e-2)
    states = []
    for resume in (False, True):
        model, items = make_recurrent()
        reconstruct(model, items, recipe, run, tmp_path, resume=resume, progress=False)
        states.append(model.state_dict())
        for late in ("003.pt", "004.pt"):
            (tmp_path / "units" / late).unlink()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_an_item_with_other_calls_than_before_is_refused():
    model, items = make_recurrent()
    runs = []

    def shrinking(model, item):
        runs.append(item)
        return model(item if len(runs) < 4 else item[:1])

    stream = UnitStream(model, items, shrinking)
    with pytest.raises(RuntimeError, match=r"item 0: the forward calls unit 'encode' 1 times, expected 3"):
        stream.collect("encode")
