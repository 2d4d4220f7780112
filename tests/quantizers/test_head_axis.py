# SPDX-License-Identifier: Apache-2.0
"""Parameters that differ from head to head of one axis."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ahcq_plugin.functional.dropping import Drop
from ahcq_plugin.quantizers import OutputErrorObserver, UniformFakeQuantize
from ahcq_plugin.quantizers.head_axis import HeadAxis


def quantizer_for(axis, bits=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    quantizer = UniformFakeQuantize(quant_max=2**bits - 1, per_head=True)
    quantizer.lay_out(axis)
    quantizer.scale.data = torch.rand(axis.count, generator=generator) + 0.05
    quantizer.zero_point = torch.randint(0, 2**bits, (axis.count,), generator=generator, dtype=torch.int32)
    quantizer.enable_fake_quant()
    return quantizer


def head_of(index, axis):
    return (index // axis.inner) % axis.count


AXES = st.builds(HeadAxis, st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))


@given(AXES, st.integers(1, 3), st.integers(2, 8), st.integers(0, 1000))
def test_every_value_has_the_grid_of_its_head(axis, rest, bits, seed):
    shape = [2, 3, 4]
    shape[-axis.from_end] = rest * axis.count * axis.inner
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2
    quantizer = quantizer_for(axis, bits, seed)
    heads = [head_of(i, axis) for i in range(shape[-axis.from_end])]
    wanted = []
    for part, head in zip(x.unbind(-axis.from_end), heads, strict=True):
        scale, zero = quantizer.scale[head], quantizer.zero_point[head]
        wanted.append((torch.round(part / scale) + zero).clamp(0, 2**bits - 1))
    codes = quantizer.encode(x)
    assert torch.equal(codes, torch.stack(wanted, -axis.from_end).long())
    assert torch.equal(quantizer(x), quantizer.decode(codes)) and torch.equal(
        quantizer.quantize_compiled(x), quantizer(x)
    )
    assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes)
    grids = quantizer.grids(x.shape)
    by_grid = (codes - grids.zero_point) * grids.scale
    assert grids.scale.shape == x.shape and torch.equal(by_grid, quantizer.decode(codes))


@pytest.mark.parametrize("axis", [HeadAxis(1, 3, 2), HeadAxis(3, 3, 1)])
def test_heads_learn_apart(axis):
    """Output and gradients are those of one quantizer a head; a seeded half of the elements is quantized."""
    shape = [2, 5, 4]
    shape[-axis.from_end] = 6
    generator = torch.Generator().manual_seed(1)
    x, above = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(2))
    quantizer = quantizer_for(axis)
    (quantizer(x) * above.detach()).sum().backward()
    found, grad, x.grad = quantizer.scale.grad.clone(), x.grad.clone(), None
    for head in range(axis.count):
        indices = torch.tensor([i for i in range(6) if head_of(i, axis) == head])
        one = UniformFakeQuantize(quant_max=15)
        one.scale.data, one.zero_point = quantizer.scale.data[head : head + 1], quantizer.zero_point[head : head + 1]
        one.enable_fake_quant()
        out = one(x.index_select(-axis.from_end, indices))
        (out * above.detach().index_select(-axis.from_end, indices)).sum().backward()
        assert float(found[head]) == pytest.approx(float(one.scale.grad), rel=1e-5)
    assert torch.allclose(grad, x.grad)
    quantizer.prob = 0.5
    torch.manual_seed(0)
    mixed = quantizer(x)
    torch.manual_seed(0)
    assert torch.equal(mixed, quantizer.quantize(x, Drop.draw(x, 0.5)))
    kept = (mixed == x).float().mean()
    assert 0.3 < float(kept) < 0.7 and bool(((mixed == x) | (mixed == quantizer.decode(quantizer.encode(x)))).all())


def test_heads_get_ranges_of_their_own_and_survive_a_state():
    quantizer = UniformFakeQuantize(quant_max=15, per_head=True)
    quantizer.lay_out(HeadAxis(1, 2, 2))
    x = torch.tensor([[-1.0, 2.0, -30.0, 4.0, 0.5, 1.0, 10.0, 0.0]])
    for factor in (1, 3):
        quantizer.observe(x * factor)
    quantizer.commit()
    assert quantizer.scale.tolist() == pytest.approx([2 * 3 / 15, 2 * 40 / 15])
    quantizer.enable_fake_quant()
    other = UniformFakeQuantize(quant_max=15, per_head=True)
    other.load_state_dict(quantizer.state_dict())
    other.look()
    assert other.head_axis == quantizer.head_axis and torch.equal(other(x), quantizer(x))
    assert torch.equal(copy.deepcopy(other)(x), quantizer(x))
    with pytest.raises(ValueError, match="an axis of 6 cannot hold 2 heads of 2"):
        quantizer(x[:, :6])


def test_what_is_not_offered():
    with pytest.raises(ValueError, match="`ch_axis` must be -1"):
        UniformFakeQuantize(quant_max=15, per_head=True, ch_axis=0)
    with pytest.raises(ValueError, match="`per_head` takes its ranges from an observer that gives them at once"):
        UniformFakeQuantize(OutputErrorObserver, quant_max=15, per_head=True)
    assert "heads" not in UniformFakeQuantize(quant_max=15).state_dict()  # earlier checkpoints stay valid
