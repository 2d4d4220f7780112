# SPDX-License-Identifier: Apache-2.0
"""The benchmark's opponent computes the same: values but for ties, gradients of the scales of uniform families."""

import pytest
import torch

from ahcq_plugin.ptq import Recipe, calibrate, prepare, quantizers, set_quantization
from ahcq_plugin.ptq.prepared import is_weight
from ahcq_plugin.studies.reference.compositions import compose, composed
from ahcq_plugin.studies.timing import start_learning, step_seconds, unit_inputs
from ahcq_plugin.zoo.sam import box_forward

POWERS = {"name": "qdrop", "families": {"post_act": "power_of_two", "softmax": "power_of_two"}}


@pytest.mark.parametrize("recipe", ["ptq4sam", "ahcq", POWERS], ids=["ptq4sam", "ahcq", "powers of two"])
def test_quantizers_and_their_compositions_agree(tiny_sam, tiny_items, recipe):
    prepare(tiny_sam, Recipe.from_config(recipe))
    calibrate(tiny_sam, tiny_items, box_forward, progress=False)
    seen = {}
    hooks = [
        quantizer.register_forward_pre_hook(lambda module, inputs: seen.__setitem__(module, inputs[0]))
        for _, quantizer in quantizers(tiny_sam)
        if not is_weight(quantizer)
    ]
    with torch.no_grad():
        box_forward(tiny_sam, tiny_items[2])
    for hook in hooks:
        hook.remove()
    for quantizer, x in seen.items():
        ours, chain = quantizer.quantize(x).detach(), compose(quantizer, x).detach()
        # ties, and values at the edge of two levels, may fall either way
        same = torch.isclose(ours, chain, rtol=1e-4, atol=1e-6).float().mean()
        assert same > 0.99, (quantizer.family, quantizer.role, float(same))


def test_a_composed_unit_learns_the_same_things(tiny_sam, tiny_items):
    prepare(tiny_sam, Recipe.from_config("ahcq"))
    calibrate(tiny_sam, tiny_items, box_forward, progress=False)
    name = "mask_decoder.transformer.layers.1"
    args, kwargs = unit_inputs(tiny_sam, tiny_items[1], [name], box_forward)[name]
    unit = tiny_sam.get_submodule(name)
    set_quantization(unit, True)
    chain = composed(unit)
    ours, theirs = start_learning(unit), start_learning(chain)
    assert [t.shape for t in ours] == [t.shape for t in theirs] and len(ours) > 10
    for module, learned in ((unit, ours), (chain, theirs)):
        assert step_seconds(module, args, kwargs, learned) > 0
        for _, quantizer in quantizers(module):
            quantizer.prob = 1.0
    for a, b in zip(unit(*args, **kwargs), chain(*args, **kwargs), strict=True):
        assert (a - b).norm() < 0.02 * a.norm()
