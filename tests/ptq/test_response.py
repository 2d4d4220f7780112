# SPDX-License-Identifier: Apache-2.0
"""Units that learn by the decoder's response, against SAM's own parts called by hand."""

import sys

import pytest
import torch
from torch import nn

from ahcq_plugin import quantize
from ahcq_plugin.graph import UnitError
from ahcq_plugin.ptq import Recipe, calibrate, prepare, reconstruct
from ahcq_plugin.ptq.prepared import weight_layers
from ahcq_plugin.ptq.response import Response, Stage, few_prompts, squared
from ahcq_plugin.ptq.stages import find_stages
from ahcq_plugin.ptq.stream import UnitStream
from ahcq_plugin.zoo.sam import box_forward, build_sam
from tests.conftest import TINY_SAM, make_tiny_items
from tests.ptq.standins import Model

TRANSFORMER = "mask_decoder.transformer"
STEPS = {"w_bits": 3, "a_bits": 4, "iterations": 40, "rounding_lr": 2e-2, "scale_lr": 1e-3}
SAQSAM = {"name": "saqsam", "pcc": False, "agq": False, "big": False, **STEPS}


def streamed(model, items, units=None):
    prepare(model, Recipe.from_config("rtn"), units)
    return UnitStream(model, items, box_forward)


def deep_sam():
    """Five blocks, global attention in the second and the fourth, and only windows in the last."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_sam({**TINY_SAM, "depth": 5, "global_attn_indexes": [1, 3]}, checkpoint=False).eval()


def transformer_by_hand(sam, image_tokens, item):
    """(prompt tokens, image tokens) of the transformer for tokens (1, h, w, C) of the encoder's blocks."""
    embedding = sam.image_encoder.neck(image_tokens.permute(0, 3, 1, 2))
    sparse, dense = sam.prompt_encoder(points=None, boxes=item["boxes"], masks=None)
    decoder = sam.mask_decoder
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([tokens.expand(len(sparse), -1, -1), sparse], 1)
    count = len(tokens)
    source = embedding.repeat_interleave(count, 0) + dense
    return decoder.transformer(source, sam.prompt_encoder.get_dense_pe().repeat_interleave(count, 0), tokens)


def test_stages_end_with_global_attention_and_layers_stand_alone():
    stages = find_stages(streamed(deep_sam(), make_tiny_items()[:1]))
    blocks = [f"image_encoder.blocks.{number}" for number in range(5)]
    layers = [f"{TRANSFORMER}.layers.{number}" for number in range(2)]
    final = f"{TRANSFORMER}.final_attn_token_to_image"
    encoder = [tuple(blocks[:2]), tuple(blocks[2:4]), (blocks[4],), ("image_encoder.neck",)]
    assert stages.groups == [*encoder, *((layer,) for layer in layers), (final,)]
    assert stages.decoder_units == {*layers, final} and stages.chain == set(blocks)
    learned = [group for group in stages.groups if stages.by_response(group)]
    assert learned == [*encoder[:3], *((layer,) for layer in layers)]  # the neck and the last one: by their own output
    assert stages.skipped_behind(encoder[0]) == set(blocks[2:]) and not stages.skipped_behind((layers[0],))


def test_tokens_of_a_stage_skip_the_rest_of_the_encoder():
    """The response to a stage is that of the neck and the transformer, called by hand; gradients reach its weights."""
    sam, items = deep_sam(), make_tiny_items()[1:]
    with torch.no_grad():
        pixels = [sam.image_encoder.patch_embed(item["image"]) + sam.image_encoder.pos_embed for item in items]
        kept = [nn.Sequential(*sam.image_encoder.blocks[:2])(x) for x in pixels]
        wanted = [transformer_by_hand(sam, x, item)[1] for x, item in zip(kept, items, strict=True)]
    stream = streamed(sam, items)
    stages = find_stages(stream)
    group = stages.groups[0]
    stream.collect(group[0])
    response = Response(stream, stages, group, Stage([stream.units[name] for name in group]))
    with response.learning():
        samples = response.samples(stream.new_store())
        for number, target in enumerate(wanted):
            torch.testing.assert_close(response.floating(number), kept[number], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                response.respond("floating", number, response.floating(number)), target, rtol=1e-4, atol=1e-5
            )
        assert float(samples.error(response.floating(1), 1)) < 1e-10
        moved = (
            kept[1] + 0.1 * torch.randn(kept[1].shape, generator=torch.Generator().manual_seed(0))
        ).requires_grad_()
        error = samples.error(moved, 1)
        with torch.no_grad():
            by_hand = squared(transformer_by_hand(sam, moved, items[1])[1], wanted[1])
        assert float(error) == pytest.approx(float(by_hand), rel=1e-4) and float(error) > 1e-6
        error.backward()
        assert float(moved.grad.abs().sum()) > 0
    assert all(p.grad is None for p in sam.parameters())
    assert all(p.requires_grad for p in stream.units["image_encoder.neck"].parameters())


def test_a_layer_of_the_decoder_learns_by_its_output_and_the_final_tokens():
    sam, items = deep_sam(), make_tiny_items()[1:2]
    calls = {}
    layer = sam.mask_decoder.transformer.layers[0]
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: calls.__setitem__(name, out))
        for name, module in (("layer", layer), ("all", sam.mask_decoder.transformer))
    ]
    with torch.no_grad():
        box_forward(sam, items[0])
    wanted = dict(calls)
    tokens, image = wanted["layer"]
    moved = tokens + 0.2, image * 1.1
    for handle in handles:
        handle.remove()
    handles = [
        layer.register_forward_hook(lambda m, args, out: moved),
        sam.mask_decoder.transformer.register_forward_hook(lambda m, args, out: calls.__setitem__("all", out)),
    ]
    with torch.no_grad():
        box_forward(sam, items[0])
    for handle in handles:
        handle.remove()
    terms = [0.01 * squared(moved[0], tokens), squared(moved[1], image), squared(calls["all"][0], wanted["all"][0])]
    stream = streamed(sam, items, [f"{TRANSFORMER}.layers.*", f"{TRANSFORMER}.final_attn_token_to_image"])
    stages, name = find_stages(stream), f"{TRANSFORMER}.layers.0"
    stream.collect(name)
    response = Response(stream, stages, (name,), stream.units[name])
    with response.learning():
        error = response.samples(stream.new_store()).error(moved, 0)
    assert all(float(term) > 1e-4 for term in terms)
    assert float(error) == pytest.approx(float(sum(terms)), rel=1e-4)


@pytest.mark.slow
def test_learning_by_response_lowers_the_response_error(tiny_sam, tiny_items):
    """Learned by the response a stage responds better than rounded to nearest; everything is on its grid in the end."""
    with torch.no_grad():
        wanted = [box_forward(tiny_sam, item)[0] for item in tiny_items]
    errors = {}
    for name, recipe in (("nearest", {"name": "rtn", "w_bits": 3, "a_bits": 4}), ("learned", SAQSAM)):
        model, report = quantize(tiny_sam, tiny_items, recipe, forward=box_forward, progress=False)
        with torch.no_grad():
            found = [box_forward(model, item)[0] for item in tiny_items]
        errors[name] = sum(float((a - b).square().mean()) for a, b in zip(found, wanted, strict=True))
    assert report.audit.passed and errors["learned"] < 0.8 * errors["nearest"]
    assert [unit.name for unit in report.units][0] == "image_encoder.blocks.0 to image_encoder.blocks.1"
    for layer in weight_layers(model).values():
        assert not layer.weight_fake_quant.adaround
        assert torch.equal(layer.weight_fake_quant.decode(layer.weight_fake_quant.encode(layer.weight)), layer.weight)


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_run_goes_on_to_equal_bits(tiny_sam, tiny_items, tmp_path, monkeypatch):
    """Killed in the fourth of five jobs: the tensors of an uninterrupted run, and finished jobs are not run again."""
    recipe = {**SAQSAM, "iterations": 5}

    def run(folder, resume=False):
        return quantize(
            tiny_sam, tiny_items, recipe, forward=box_forward, work_dir=folder, resume=resume, progress=False
        )[0].state_dict()

    whole = run(tmp_path / "whole")
    module, started = sys.modules["ahcq_plugin.ptq.reconstruct"], []
    optimise = module.optimise

    def dying(*args):
        started.append(args[1])
        if len(started) == 4:
            raise Killed
        optimise(*args)

    monkeypatch.setattr(module, "optimise", dying)
    with pytest.raises(Killed):
        run(tmp_path / "broken")
    resumed = run(tmp_path / "broken", resume=True)
    assert started[4:] == [f"{TRANSFORMER}.layers.1", f"{TRANSFORMER}.final_attn_token_to_image"]
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_at_most_sixteen_prompts_are_drawn_by_the_seed():
    items = [{"image": torch.zeros(1), "boxes": torch.arange(80.0).view(20, 4), "labels": torch.arange(20)}]
    items += [{"boxes": torch.arange(8.0).view(2, 4)}, (torch.ones(30, 2),)]
    (many, few, other), again = few_prompts(items, 0), few_prompts(items, 0)[0]
    assert len(many["boxes"]) == len(many["labels"]) == 16 and many["image"] is items[0]["image"]
    assert torch.equal(many["boxes"][:, 0], many["labels"] * 4.0) and bool((many["labels"].diff() > 0).all())
    assert few is items[1] and other is items[2] and torch.equal(again["boxes"], many["boxes"])
    assert not torch.equal(few_prompts(items, 1)[0]["boxes"], many["boxes"])


def test_models_without_a_promptable_decoder_are_refused():
    """A plain classifier has no tokens of prompts."""
    images = [torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))]
    with pytest.raises(UnitError, match="`par` needs a decoder as SAM's: a module around the last unit, 'blocks.1'"):
        quantize(Model().eval(), images, {**SAQSAM, "iterations": 1}, progress=False)
    with pytest.raises(ValueError, match="`par` needs the granularity `unit` or `none`, got 'layer'"):
        Recipe.from_config("saqsam", granularity="layer")
    with pytest.raises(ValueError, match="`refit` and `par` exclude each other"):
        Recipe.from_config("ahcq_plus", par=True)


def test_a_forward_without_gradients_is_named(tiny_sam, tiny_items):
    recipe = Recipe.from_config(SAQSAM, iterations=1)

    @torch.no_grad()
    def forward(model, item):
        return box_forward(model, item)

    prepare(tiny_sam, recipe)
    calibrate(tiny_sam, tiny_items[:1], forward, progress=False)
    with pytest.raises(ValueError, match="`par` needs gradients through the decoder"):
        reconstruct(tiny_sam, tiny_items[:1], recipe, forward, progress=False)
    assert all(p.requires_grad for p in tiny_sam.mask_decoder.parameters())
