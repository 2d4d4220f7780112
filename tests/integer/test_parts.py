# SPDX-License-Identifier: Apache-2.0
"""A decoder on integers takes its prompts in parts and gives the masks of the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ahcq_plugin.graph import prepared_units
from ahcq_plugin.integer import parts, to_integer
from tests.integer.conftest import quantized_sam, quantized_sam2


class Decoder(nn.Module):
    """As a SAM's, by its names: masks of prompts on one image, or on one each; a list of maps and a switch beside."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.output_hypernetworks_mlps, self.seen = nn.Identity(), nn.ModuleList(), list[int]()

    def forward(self, image: torch.Tensor, prompts: torch.Tensor, maps: list, twice: bool) -> tuple:
        self.seen.append(len(prompts))
        masks = image + prompts + sum(maps)
        return (2 * masks if twice else masks), [prompts.sum(1)]


@pytest.mark.parametrize("items", [0, 1, 2, 5])
@pytest.mark.parametrize("images", ["one", "each"])
def test_results_are_those_of_the_whole_batch(items, images, monkeypatch):
    decoder, whole = Decoder(), Decoder()
    parts.run_in_parts(nn.ModuleList([decoder]))
    monkeypatch.setattr(parts, "PART_BYTES", 2 * 3 * 4)  # two prompts
    generator = torch.Generator().manual_seed(items)
    image = torch.randn(items if images == "each" else 1, 3, generator=generator)
    given = (image, torch.randn(items, 3, generator=generator), [torch.ones(1, 3), torch.ones(1, 1)])
    got, wanted = decoder(*given, twice=True), whole(*given, twice=True)
    assert type(got) is tuple and torch.equal(got[0], wanted[0]) and torch.equal(got[1][0], wanted[1][0])
    assert decoder.seen == {0: [0], 1: [1], 2: [2], 5: [2, 2, 1]}[items]


def test_what_is_no_batch_of_prompts_is_taken_at_once(monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 1)
    decoder = Decoder()
    parts.run_in_parts(decoder)
    decoder(torch.ones(2, 1), torch.ones(2, 2), [torch.ones(1, 2)], False)
    decoder(torch.ones(1, 2), torch.ones(1, 2), [torch.ones(3, 2)], False)  # the maps alone are several
    assert decoder.seen == [1, 1, 1, 1, 1]
    with pytest.raises(RuntimeError, match="must match"):
        decoder(torch.ones(2, 2), torch.ones(3, 2), [torch.ones(1, 2)], False)
    assert decoder.seen[5:] == [3]


@pytest.mark.parametrize("bits", [4, 8])
def test_masks_of_several_prompts_do_not_depend_on_parts(bits, monkeypatch):
    sam = to_integer(quantized_sam("rtn", bits))
    decoder, grid = sam.mask_decoder, sam.prompt_encoder.image_embedding_size
    generator = torch.Generator().manual_seed(0)
    dim = decoder.transformer_dim
    given = {
        "image_embeddings": torch.randn(1, dim, *grid, generator=generator),
        "image_pe": sam.prompt_encoder.get_dense_pe(),
        "sparse_prompt_embeddings": torch.randn(5, 2, dim, generator=generator),
        "dense_prompt_embeddings": torch.randn(5, dim, *grid, generator=generator),
        "multimask_output": True,
    }
    keys, sizes, hooked = list(decoder.state_dict()), list[int](), list[int]()
    final = decoder.transformer.final_attn_token_to_image
    final.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(kwargs["q"])), with_kwargs=True)
    decoder.register_forward_hook(lambda _, args, out: hooked.append(len(out[0])))
    with torch.no_grad():
        whole = decoder(**given)
        monkeypatch.setattr(parts, "PART_BYTES", 2 * dim * grid[0] * grid[1] * 4)
        split = decoder(**given)
    assert sizes == [5, 2, 2, 1] and hooked == [5, 5] and list(decoder.state_dict()) == keys
    for got, wanted in zip(split, whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantized", [lambda: quantized_sam("rtn", 8), quantized_sam2], ids=["SAM", "SAM 2"])
def test_only_the_integer_model_has_it_and_only_its_decoder(quantized):
    model = quantized()
    changed = [name for name, module in to_integer(model).named_modules() if "forward" in vars(module)]
    assert len(changed) == 1 and changed[0].endswith("mask_decoder")
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(name in dict(model.named_modules()) for name in prepared_units(model))
