# SPDX-License-Identifier: Apache-2.0
"""Which modules are units."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ahcq_plugin.graph import UnitError, find_units, trace_unit


def sam_units(depth: int) -> list[str]:
    transformer = "mask_decoder.transformer"
    blocks = [f"image_encoder.blocks.{i}" for i in range(depth)]
    decoder = [f"{transformer}.layers.0", f"{transformer}.layers.1", f"{transformer}.final_attn_token_to_image"]
    return [*blocks, "image_encoder.neck", *decoder]


def test_sam_b_has_16_units_and_sam_l_28(sam_b, sam_l):
    assert find_units(sam_b) == sam_units(12) and len(sam_units(12)) == 16
    assert find_units(sam_l) == sam_units(24) and len(sam_units(24)) == 28


def test_timm_vit_has_its_blocks(vit_tiny):
    assert find_units(vit_tiny) == [f"blocks.{i}" for i in range(12)]


def test_units_by_type_name_and_glob(sam_b):
    block = type(sam_b.image_encoder.blocks[0])
    blocks = sam_units(12)[:12]
    assert find_units(sam_b, block) == find_units(sam_b, [block]) == blocks
    assert find_units(sam_b, "image_encoder.blocks.*") == blocks
    assert find_units(sam_b, ["image_encoder.neck", "image_encoder.blocks.1"]) == [blocks[1], "image_encoder.neck"]
    assert find_units(sam_b, ["image_encoder.blocks.1?", block]) == blocks


@pytest.mark.parametrize("spec", ["encoder.blocks.0", "nothing*", nn.LSTM, ["image_encoder.neck", "nothing"]])
def test_a_spec_that_matches_nothing_is_named_beside_some_module_names(sam_b, spec):
    name = "LSTM" if spec is nn.LSTM else spec[-1] if isinstance(spec, list) else spec
    with pytest.raises(ValueError, match="matches no module; some module names: image_encoder, ") as caught:
        find_units(sam_b, spec)
    assert repr(name) in str(caught.value)


def test_module_lists_and_other_things_are_refused(sam_b):
    with pytest.raises(ValueError, match=r"is a ModuleList, which has no forward; use 'image_encoder.blocks.\*'"):
        find_units(sam_b, "image_encoder.blocks")
    with pytest.raises(TypeError, match="takes module types, names and globs, got 3"):
        find_units(sam_b, [3])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(F.softmax(q @ k.transpose(1, 2), dim=-1) @ v)


class Dynamic(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() > 0 else F.softmax(x, dim=-1)


class Mlp(nn.Sequential):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm, nn.Linear(4, 8), nn.GELU(), nn.Dropout(), nn.Linear(8, 4))


class Stage(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_inner_lists_win_and_mlps_count_only_with_a_norm():
    model = nn.Sequential(Stage(Attention(), Mlp(nn.LayerNorm(4))), Stage(Attention(), Mlp(nn.Identity())))
    assert find_units(model) == ["0.blocks.0", "0.blocks.1", "1.blocks.0"]


def test_standalone_attention_is_a_unit_where_no_unit_lies_inside():
    model = nn.Module()
    model.stage, model.pool, model.head = Stage(Attention()), Attention(), nn.Linear(4, 2)
    assert find_units(model) == ["stage.blocks.0", "pool"]


def test_necks_are_convolutions_and_norms_beside_the_blocks():
    def neck(*extra: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), *extra)

    model, elsewhere = Stage(Attention()), nn.Module()
    model.neck, model.with_activation, model.one_conv = neck(), neck(nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 1))
    elsewhere.neck = neck()
    root = nn.Module()
    root.encoder, root.elsewhere = model, elsewhere
    assert find_units(root) == ["encoder.blocks.0", "encoder.neck"]


def test_a_block_that_does_not_trace_stays_a_unit_so_that_its_error_is_seen():
    model = Stage(Attention(), Dynamic())
    assert find_units(model) == ["blocks.0", "blocks.1"]
    with pytest.raises(RuntimeError, match=r"unit 'blocks.1' \(Dynamic\) does not trace at .*`units=`"):
        trace_unit(model.blocks[1], "blocks.1")
    assert find_units(model, ["blocks.0"]) == ["blocks.0"]


def test_finding_units_runs_and_changes_nothing():
    model = Stage(Attention(), Mlp(nn.LayerNorm(4))).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.modules())
    find_units(model)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True)) and all(m.training for m in modules)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Branching(nn.Module):
    def forward(self, x, **kwargs):
        if x.sum() > 0:
            return x
        return -x


def test_a_block_with_keywords_that_does_not_trace_is_named_with_its_file():
    """torch.fx patches the code of such a ``forward``: its frames may have no line."""
    with pytest.raises(
        UnitError, match=r"unit 'b' \(Branching\) does not trace at .*test_units\.py:\d+: .*control flow"
    ):
        trace_unit(Branching(), "b")
