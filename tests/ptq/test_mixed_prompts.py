# SPDX-License-Identifier: Apache-2.0
"""Items with other numbers of prompt tokens, and with image tokens that differ from object to object, in one run."""

import pytest
import torch

from ahcq_plugin import quantize
from ahcq_plugin.ptq import Recipe, calibrate, prepare
from ahcq_plugin.ptq.prepared import intercepted, set_quantization
from ahcq_plugin.ptq.stream import UnitStream
from ahcq_plugin.zoo.items import scene_items
from ahcq_plugin.zoo.prompts import mixed_items, prompt_forward

EVERY_KIND = {"box": 0.2, "click1": 0.2, "click3": 0.2, "mask": 0.2, "grid": 0.2}


@pytest.fixture
def items(tiny_sam):
    return mixed_items(tiny_sam, list(scene_items(5, seed=2, size=64)), EVERY_KIND, most=2, seed=0)


def test_units_get_what_they_get_in_the_model(tiny_sam, items, tmp_path):
    prepare(tiny_sam, Recipe.from_config("rtn"))
    calibrate(tiny_sam, items, prompt_forward, progress=False)
    set_quantization(tiny_sam, False)
    stream = UnitStream(tiny_sam, items, prompt_forward, "disk", tmp_path)
    decoder = [name for name in stream.order if name.startswith("mask_decoder")]
    seen = {}

    def note(name, call, args, kwargs):
        seen[name] = (args, kwargs)
        return call(*args, **kwargs)

    tokens = set()
    for name in stream.order:
        stream.collect(name)
        assert len(stream.samples) == len(items)
        for sample, (item, _) in enumerate(stream.samples if name in decoder else ()):
            with torch.no_grad(), intercepted(stream.units, note):
                prompt_forward(tiny_sam, items[item])
            args, kwargs = stream.inputs("floating", sample)
            expected = [*seen[name][0], *seen[name][1].values()]
            found = [*args, *kwargs.values()]
            assert [t.shape for t in found] == [t.shape for t in expected]
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
            tokens.add(min(t.shape[1] for t in found))
        stream.advance(name)
        set_quantization(stream.units[name], False)
    stream.close()
    assert tokens == {7, 9}, "five output tokens and two or four of the prompt"


def test_a_mixed_run_is_audited(tiny_sam, items):
    recipe = Recipe.from_config(dict(name="ahcq", acnr=False, iterations=3))
    model, report = quantize(tiny_sam, items, recipe, forward=prompt_forward, progress=False)
    assert report.audit.passed and all(unit.error_after < 1 for unit in report.units)
    for item in items:  # also kinds that the audited item is not of
        with torch.no_grad():
            assert all(out.isfinite().all() for out in prompt_forward(model, item))
