# SPDX-License-Identifier: Apache-2.0
"""The package on a device that is not the host: the CPU's results, no mix of devices, no wait in a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from ahcq_plugin import load_quantized, quantize, save_quantized
from ahcq_plugin.export import export_onnx, make_spec
from ahcq_plugin.export.spec_io import save_spec
from ahcq_plugin.graph import prepared_units
from ahcq_plugin.ptq import Recipe, audit
from ahcq_plugin.ptq.prepared import quantizers
from ahcq_plugin.quantizers import ACTIVATION_FAMILIES
from ahcq_plugin.zoo.predict import predict_masks
from ahcq_plugin.zoo.sam import box_forward
from tests.conftest import computing_state, make_clips, make_sam2, make_tiny_items, make_tiny_sam
from tests.device.strict import Events, counting, load

pytestmark = pytest.mark.slow
RECIPES = ("rtn", "brecq", "qdrop", "ptq4sam", "ahcq", "ahcq_plus")
#: Fused attention of the CPU sums in another order than what the device is given; no code of these models flips.
LIMIT = 1e-5


@pytest.fixture(scope="module", autouse=True)
def device():
    return load()


def on(device: str, tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), tree)


def quantized(recipe: str, device: str, **options: Any):
    options = {} if recipe == "rtn" else {"iterations": 2, **options}
    items = on(device, make_tiny_items())
    model, _ = quantize(make_tiny_sam().to(device), items, recipe, 4, 4, forward=box_forward, progress=False, **options)
    return model, items


def masks(model, items) -> list[torch.Tensor]:
    with torch.no_grad():
        return [box_forward(model, item)[0].cpu() for item in items]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_gives_the_cpus_masks(recipe) -> None:
    """It is audited in ``quantize``, and what is not on the device is refused by the device."""
    found = [masks(*quantized(recipe, device)) for device in ("cpu", "strict")]
    for wanted, mine in zip(*found, strict=True):
        assert float((wanted - mine).abs().max()) < LIMIT


def test_what_is_made_of_it_is_as_on_the_cpu(tmp_path) -> None:
    model, items = quantized("ahcq", "strict")
    assert audit(model, items[0], box_forward).counts
    save_quantized(model, tmp_path / "q.safetensors")
    loaded = load_quantized(tmp_path / "q.safetensors")
    for name, value in computing_state(loaded).items():
        assert value.device.type == "cpu" and torch.equal(value, computing_state(model)[name].cpu()), name
    save_spec(make_spec(model), tmp_path / "device")
    save_spec(make_spec(loaded), tmp_path / "cpu")
    for file in sorted((tmp_path / "device").iterdir()):
        assert file.read_bytes() == (tmp_path / "cpu" / file.name).read_bytes(), file.name
    for style in ("exact", "deploy"):
        export_onnx(model, tmp_path / style, style=style)
        assert (tmp_path / style / "bundle.json").is_file()
    image = np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)
    boxes = np.array([[4.0, 5.0, 30.0, 40.0]])
    assert np.array_equal(predict_masks(model, image, boxes)[0], predict_masks(loaded, image, boxes)[0])


def test_a_stopped_run_goes_on_from_its_files(tmp_path) -> None:
    whole, items = quantized("qdrop", "strict")
    options = {"work_dir": tmp_path, "resume": True}
    quantized("qdrop", "strict", **options)
    last = sorted(tmp_path.rglob("*.pth"))[-1]
    last.unlink()
    resumed, _ = quantized("qdrop", "strict", **options)
    assert all(torch.equal(a, b) for a, b in zip(masks(whole, items), masks(resumed, items), strict=True))


def test_sam2_follows_objects_as_on_the_cpu() -> None:
    pytest.importorskip("sam2")
    from ahcq_plugin.zoo.track import clip_forward

    found = []
    for device in ("cpu", "strict"):
        clips = on(device, make_clips())
        model, _ = quantize(
            make_sam2().to(device), clips, "qdrop", 4, 4, forward=clip_forward, progress=False, iterations=2
        )
        with torch.no_grad():
            found.append([leaf.cpu() for leaf in pytree.tree_leaves(clip_forward(model, clips[0]))])
    for wanted, mine in zip(*found, strict=True):
        assert float((wanted.float() - mine.float()).abs().max()) < LIMIT


@pytest.mark.parametrize("recipe", RECIPES[1:])
def test_a_step_waits_for_nothing(recipe) -> None:
    """Its data come from the host, where they are kept unless told otherwise: a copy of each tensor of a call."""
    counted: list[Events] = []
    for iterations in (12, 24):
        with counting() as events:
            model, _ = quantized(recipe, "strict", iterations=iterations)
        counted.append(events)
    steps = 12 * len(prepared_units(model))
    more = {event: counted[1][event] - counted[0][event] for event in ("wait", "to host", "to device")}
    assert more["wait"] == more["to host"] == 0, counted[1].places.most_common(10)
    assert more["to device"] <= 8 * steps


@pytest.mark.parametrize("family", ACTIVATION_FAMILIES)
def test_quantizers_wait_for_nothing(family) -> None:
    quantizer = ACTIVATION_FAMILIES[family](quant_max=15, role="softmax").to("strict")
    x = torch.softmax(torch.randn(6, 8, device="strict"), -1)
    quantizer.observe(x)
    quantizer.commit()
    quantizer.finish()
    quantizer.enable_fake_quant()
    quantizer(x)  # what it knows of its buffers it reads once
    with counting() as events:
        quantizer(x)
    assert not events.operators, dict(events.places)


def test_weights_are_quantized_without_a_wait() -> None:
    model, items = quantized("rtn", "strict")
    layer = next(layer for layer in model.modules() if hasattr(layer, "weight_fake_quant"))
    x = torch.randn(1, *([8] * 2), layer.weight.shape[1], device="strict")
    masks(model, items)
    with torch.no_grad(), counting() as events:
        layer(x)
    assert not events.operators, dict(events.places)


def test_quantizers_are_where_their_unit_is() -> None:
    from ahcq_plugin.ptq import prepare

    model = prepare(make_tiny_sam().to("strict"), Recipe.from_config("ahcq"))
    tensors = [t for _, q in quantizers(model) for t in (*q.parameters(), *q.buffers())]
    assert len(tensors) > 100 and {tensor.device.type for tensor in tensors} == {"strict"}
