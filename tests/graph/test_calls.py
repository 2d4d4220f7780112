# SPDX-License-Identifier: Apache-2.0
"""Units are traced as they are really called, give what their blocks give, and refuse what they were not traced for."""

import copy
import io
import operator
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ahcq_plugin import load_quantized, quantize
from ahcq_plugin.graph import UnitError, find_roles, trace_unit
from ahcq_plugin.graph.calls import Call, Opaque, TensorExample, Varying, record_calls
from ahcq_plugin.graph.ops import GraphIndex
from ahcq_plugin.graph.positions import RELATIVE_POSITIONS, exception_of
from ahcq_plugin.ptq import Recipe, prepare

WIDTH = 8


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / WIDTH**0.5, -1) @ v


class Block(nn.Module):
    """An attention and an MLP; subclasses say how it is called and what it asks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.lin1, self.lin2 = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def attention(self, x: Tensor, turn: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if turn is not None:
            q, k = q * turn, k * turn
        return self.proj(attend(q, k, v))

    def mlp(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class Rope(Block):
    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm(x), rope)
        return x + self.mlp(x)


class Kwargs(Block):
    """Passes on what it does not know, as transformers' blocks do."""

    def forward(self, x: Tensor, **kwargs: object) -> Tensor:
        x = x + self.part(self.norm(x), **kwargs)
        return x + self.mlp(x)

    def part(self, x: Tensor, turn: Tensor | None = None, scale: float = 1.0, **kwargs: object) -> Tensor:
        return scale * self.attention(x, turn)


class Ranks(Block):
    def forward(self, x: Tensor) -> Tensor:
        is_map = x.ndim == 4
        if is_map:
            batch, height, width, _ = x.shape
            x = x.reshape(batch, height * width, WIDTH)
        x = x + self.attention(self.norm(x))
        if is_map:
            x = x.view(batch, height, width, WIDTH)
        *leading, _ = x.shape
        return self.mlp(x).reshape(*leading, WIDTH)


class Sizes(Block):
    """Pads to a whole number of windows, and makes a table of distances of the size that it needs."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        if tokens % 4:
            x = F.pad(x, (0, 0, 0, 4 - tokens % 4))
        steps = torch.arange(x.shape[1], device=x.device)
        distance = (steps[:, None] - steps[None, :]).abs().float()
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = q @ k.transpose(-2, -1)
        scores[..., :2] = scores[..., :2] + 1.0
        x = x + self.proj(torch.softmax(scores - distance, -1) @ v)
        return self.mlp(x[:, :tokens])


@dataclass
class Output(OrderedDict):
    """As transformers' ModelOutput: a dataclass and a dict."""

    hidden: Tensor | None = None
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        self.update(hidden=self.hidden)


pytree.register_pytree_node(  # as transformers does
    Output, lambda out: ([out.hidden], None), lambda leaves, _: Output(hidden=next(iter(leaves)))
)


class Outputs(Block):
    def forward(self, pair: tuple[Tensor, Tensor], extra: dict[str, Tensor]) -> Output:
        x, y = pair
        for value in extra.values():
            x = x + value
        return Output(hidden=self.mlp(self.attention(self.norm(x + y))))


class Net(nn.Module):
    def __init__(self, block: nn.Module, *args: object, **kwargs: object) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block, copy.deepcopy(block)])
        self.args, self.kwargs = args, kwargs

    def forward(self, x: object) -> Tensor:
        for block in self.blocks:
            out = block(x, *self.args, **self.kwargs)
            x = (out["hidden"], out["hidden"]) if isinstance(out, Output) else out
        return x[0] if isinstance(x, tuple) else x


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TURN = tokens(WIDTH, seed=5)
CASES = {
    "an optional tensor": lambda: (Net(Rope(), TURN), tokens(2, 6, WIDTH)),
    "an optional tensor by name": lambda: (Net(Rope(), rope=TURN), tokens(2, 6, WIDTH)),
    "keywords passed on": lambda: (Net(Kwargs(), turn=TURN, scale=0.5, unknown=None), tokens(2, 6, WIDTH)),
    "three dimensions": lambda: (Net(Ranks()), tokens(2, 6, WIDTH)),
    "four dimensions": lambda: (Net(Ranks()), tokens(2, 2, 3, WIDTH)),
    "sizes that fit": lambda: (Net(Sizes()), tokens(2, 8, WIDTH)),
    "sizes that do not": lambda: (Net(Sizes()), tokens(2, 6, WIDTH)),
    "trees in, a dataclass out": lambda: (
        Net(Outputs(), {"a": TURN, "b": TURN}),
        (tokens(2, 6, WIDTH), tokens(2, 6, WIDTH, seed=1)),
    ),
}


def make(case: str) -> tuple[Net, object]:
    torch.manual_seed(0)
    net, item = CASES[case]()
    return net.eval(), item


@pytest.mark.parametrize("case", CASES)
def test_what_the_block_is_called_with_decides_what_is_traced(case):
    net, item = make(case)
    with torch.no_grad():
        expected = net(item)
        prepare(net, Recipe.from_config("rtn"), run=lambda model: model(item))
        assert torch.equal(net(item), expected)
    kinds = {type(m).__name__ for m in net.blocks[0].modules()}
    assert "QuantLinear" in kinds and "Linear" not in kinds  # attention and MLP, not one of them


@pytest.mark.parametrize("case", CASES)
def test_a_quantized_model_is_saved_loaded_copied_and_pickled(case, tmp_path):
    net, item = make(case)
    model, report = quantize(net, [(item,)], "rtn", w_bits=8, a_bits=8, work_dir=tmp_path, progress=False)
    with torch.no_grad():
        expected, quantized = net(item), model(item)
        assert report.audit.passed and float((quantized - expected).norm() / expected.norm()) < 0.1
        loaded = load_quantized(tmp_path / "quantized.pth", lambda state: make(case)[0])
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        pickled = torch.load(buffer, weights_only=False)
        for twin in (loaded, copy.deepcopy(model), pickled):
            assert torch.equal(twin(item), quantized)
            assert [str(n.target) for n in twin.blocks[0].graph.nodes] == [
                str(n.target) for n in model.blocks[0].graph.nodes
            ]
        assert pickled.blocks[0].meta["ahcq_unit"]["placements"] == model.blocks[0].meta["ahcq_unit"]["placements"]


def unit(case: str) -> tuple[nn.Module, Net]:
    net, item = make(case)
    calls = record_calls(net, lambda: net(item))
    return trace_unit(net.blocks[0], "blocks.0", call=calls.by_name["blocks.0"]), net


def test_another_call_is_refused_or_right():
    traced, net = unit("three dimensions")
    x = tokens(1, 9, WIDTH, seed=2)
    assert torch.equal(traced(x), net.blocks[0](x))  # another size works
    with pytest.raises(
        ValueError, match=r"`is_map = x.ndim == 4`.*gave False.*gives True|`if is_map:` gave False.*True"
    ):
        traced(tokens(2, 2, 3, WIDTH))
    traced, net = unit("sizes that do not")
    x = tokens(1, 11, WIDTH, seed=2)
    assert torch.equal(traced(x), net.blocks[0](x))
    with pytest.raises(ValueError, match=r"`if tokens % 4:`"):
        traced(tokens(1, 8, WIDTH))
    traced, _ = unit("an optional tensor")
    with pytest.raises(ValueError, match="`rope` was a tensor when this unit was traced, got None"):
        traced(tokens(2, 6, WIDTH))
    traced, _ = unit("keywords passed on")
    with pytest.raises(ValueError, match="`scale` was fixed to 0.5 when this unit was traced, got 0.25"):
        traced(tokens(2, 6, WIDTH), turn=TURN, scale=0.25, unknown=None)


def test_attributes_classes_and_hooks_survive():
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.linear = 2, nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    class Outer(Rope):
        def __init__(self) -> None:
            super().__init__()
            self.window_size, self.inner, self.layers_of_it = 14, Inner(), []
            self.layers_of_it.append(self.inner)

        def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
            return super().forward(self.inner(x), rope)

    block = Outer()
    block.register_forward_hook(lambda module, args, output: output * 2)
    traced = trace_unit(block, "block")
    assert traced.window_size == 14 and type(traced.inner) is Inner and traced.inner.heads == 2
    assert not hasattr(traced, "layers_of_it")  # would keep the floating-point layers
    x = tokens(2, 6, WIDTH)
    for twin in (traced, copy.deepcopy(traced)):
        assert torch.equal(twin(x), block(x)) and twin.window_size == 14 and type(twin.inner) is Inner


def test_hooks_on_layers_survive():
    net, item = make("three dimensions")
    seen = []
    net.blocks[0].lin1.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    net = prepare(net, Recipe.from_config("rtn"), run=lambda model: model(item))
    seen.clear()
    net(item)
    assert seen == ["QuantLinear"]


class Wrong(Rope):
    """Is traced another way than it runs: a value that the tracer cannot know to change."""

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        gain = 2.0 if isinstance(x, Tensor) else 1.0
        return gain * super().forward(x, rope)


def test_a_trace_that_computes_something_else_is_refused():
    net = Net(Wrong()).eval()
    with pytest.raises(
        UnitError, match=r"unit 'blocks.0' \(Wrong\): its trace does not compute.*values differ by up to"
    ):
        prepare(net, Recipe.from_config("rtn"), run=lambda model: model(tokens(2, 6, WIDTH)))
    assert isinstance(net.blocks[0], Wrong)


class NotANumber(Rope):
    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        return super().forward(x, rope) * (1.0 if isinstance(x, Tensor) else float("nan"))


def test_a_trace_that_gives_nan_is_refused():
    with pytest.raises(UnitError, match=r"its trace does not compute.*values differ by up to nan"):
        prepare(Net(NotANumber()).eval(), Recipe.from_config("rtn"), run=lambda model: model(tokens(2, 6, WIDTH)))


class TwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Rope(), Rope()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.blocks[1](x, TURN))
        return self.blocks[0](x, rope=TURN)


def test_a_block_that_is_called_in_two_ways_is_named(caplog):
    run = lambda model: model(tokens(2, 6, WIDTH))  # noqa: E731
    with pytest.raises(UnitError, match=r"unit 'blocks.0' gets None and tensor of shape \(8,\) as `rope`"):
        prepare(TwoWays().eval(), Recipe.from_config("rtn"), units=["blocks.*"], run=run)
    net = prepare(TwoWays().eval(), Recipe.from_config("rtn"), run=run)
    assert type(net.blocks[0]) is Rope and type(net.blocks[1]) is not Rope
    assert "'blocks.0' gets None and tensor of shape (8,) as `rope`" in caplog.text


class Distances(Block):
    """Relative positions written in line, as transformers' SAM has them."""

    def __init__(self, is_added: bool) -> None:
        super().__init__()
        self.table, self.is_added = nn.Parameter(tokens(11, WIDTH, seed=3)), is_added

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        steps = torch.arange(x.shape[1])
        relative = torch.einsum("bqc,qkc->bqk", q, self.table[steps[:, None] - steps[None, :] + 5])
        scores = q @ k.transpose(-2, -1)
        x = self.proj(torch.softmax(scores + relative if self.is_added else relative, -1) @ v)
        return self.mlp(x)


def test_products_with_tables_are_exceptions_only_where_they_are_added_to_scores():
    run = lambda model: model(tokens(2, 6, WIDTH))  # noqa: E731
    net = prepare(Net(Distances(True)).eval(), Recipe.from_config("rtn"), run=run)
    graph = GraphIndex(net.blocks[0], net.blocks[0].graph)
    named = {exception_of(graph, n): n.target for n in graph.graph.nodes if n.target is torch.einsum}
    assert list(named) == [RELATIVE_POSITIONS]
    with pytest.raises(ValueError, match=r"einsum"):
        prepare(Net(Distances(False)).eval(), Recipe.from_config("rtn"), run=run)


class Unused(Rope):
    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        torch.softmax(x @ x.transpose(-2, -1), -1).mul(2)  # as transformers' SAM 2 does
        return super().forward(x, rope)


def test_products_that_nobody_reads_are_erased():
    traced = trace_unit(Unused(), "unit")
    assert sum(n.target in (operator.matmul, torch.matmul) for n in traced.graph.nodes) == 2
    find_roles(traced)  # refuses products that belong to no attention


plain = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-2, 2) | st.text(max_size=3) | st.just(torch.float16)
tensor = st.builds(
    lambda shape, dtype: torch.empty(shape, dtype=dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.bool, torch.int64]),
)
values = st.recursive(
    plain | tensor,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.lists(values, max_size=3), st.dictionaries(st.text(min_size=1, max_size=3), values, max_size=3))
def test_calls_survive_a_file(args, kwargs):
    call = Call.of(tuple(args), kwargs)
    assert Call.from_dict(call.to_dict()) == call
    assert call.merged(call, Rope.forward) == call


def test_calls_that_differ_in_numbers_and_sizes_have_a_common_form():
    first, second = Call.of((tokens(2, 3), 4), {"n": 1}), Call.of((tokens(5, 3), 4), {"n": 2})
    assert first.merged(second, Rope.forward) == Call(
        (TensorExample((2, 3), (3, 1), torch.float32), 4), {"n": Varying(1)}
    )
    for other in (Call.of((tokens(2), 4), {"n": 1}), Call.of((tokens(2, 3).long(), 4), {"n": 1})):
        with pytest.raises(ValueError, match="as argument 1"):
            first.merged(other, Rope.forward)
    assert Call.of((object(),), {}).args == (Opaque("object"),)
    with pytest.raises(ValueError, match="not a recorded call"):
        Call.from_dict({"args": [{"tensor": [[1], [1], "load"]}], "kwargs": {}})
