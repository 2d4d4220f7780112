# SPDX-License-Identifier: Apache-2.0
"""The style ``deploy``: graphs that runtimes execute on integers, near the fake-quantized model; bundles' driver."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from segment_anything import SamPredictor

from ahcq_plugin import quantize
from ahcq_plugin.export import OnnxSam, SpecError, export_onnx, onnx_runtimes
from ahcq_plugin.export.onnx_bundle import BUNDLE_FILE, DECODER_FILE, ENCODER_FILE, note_parity, read_bundle
from ahcq_plugin.export.onnx_deploy import DeployLinear, DequantizedWeight, deploy_quantizer, has_standard_form
from ahcq_plugin.export.onnx_graphs import deploy_model
from ahcq_plugin.ptq.prepared import activation_quantizers, is_weight, quantizers, weight_layers
from ahcq_plugin.quantizers import AdaRoundFakeQuantize, quantize_layer
from ahcq_plugin.zoo.sam import box_forward
from tests.conftest import make_tiny_items, make_tiny_sam

FAMILIES = {"cag": True, "hluq": True, "lnq": True}


def tiny(w_bits=8, a_bits=8, **recipe):
    recipe = {"name": "rtn", "w_bits": w_bits, "a_bits": a_bits, **recipe}
    return quantize(make_tiny_sam(), make_tiny_items()[:1], recipe, forward=box_forward, progress=False)[0]


@pytest.fixture(scope="module")
def w8a8():
    return tiny()


@pytest.fixture(scope="module")
def w4a4():
    return tiny(4, 4, **FAMILIES)


@pytest.fixture(scope="module")
def folder(w8a8, tmp_path_factory):
    path = tmp_path_factory.mktemp("deploy")
    export_onnx(w8a8, path, style="deploy")
    return path


@pytest.fixture(scope="module")
def driver(folder):
    return OnnxSam(folder, 1)


def stored(path):
    """Name -> (type, array) of the initializers of a graph."""
    return {t.name: (t.data_type, onnx.numpy_helper.to_array(t)) for t in onnx.load(path).graph.initializer}


def error(found, wanted):
    found, wanted = (torch.as_tensor(x) for x in (found, wanted))
    return float((found - wanted).norm() / wanted.norm())


def layer_of(bits, conv):
    """A quantized layer whose weight has the extreme codes, with zero points at both ends and between."""
    top = 2**bits - 1
    quantizer = AdaRoundFakeQuantize(quant_max=top)
    quantizer.scale, quantizer.zero_point = torch.tensor([0.1, 0.3, 0.07]), torch.tensor([0, top, top // 3]).int()
    quantizer.enable_fake_quant()
    layer = torch.nn.Conv2d(2, 3, (3, 1)) if conv else torch.nn.Linear(6, 3)
    codes = torch.tensor([0, top, 1, top // 2, top - 1, top // 3]).repeat(3, 1)
    layer.weight.data = quantizer.decode(codes).reshape(layer.weight.shape)
    return quantize_layer(layer, quantizer)


@torch.no_grad()
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_are_kept_or_rounded_to_the_nearest_of_255_steps(bits, conv):
    layer = layer_of(bits, conv)
    wanted, stand_in = layer.weight_fake_quant(layer.weight), DequantizedWeight(layer)
    found = stand_in(layer.weight)
    assert stand_in.codes.dtype == torch.int8 and not bool(stand_in.zero_point.any())
    if bits < 8:
        assert torch.equal(found, wanted)
    else:
        half = wanted.flatten(1).abs().amax(1) / 127 / 2
        off = (found - wanted).flatten(1).abs().amax(1)
        assert bool((off <= half * (1 + 1e-5)).all()) and bool((off > 0).any())
    if bits <= 4:
        packed = DequantizedWeight(layer, int4=True)
        assert int(packed.codes.min()) >= -8 and int(packed.codes.max()) <= 7
        assert torch.equal(packed(layer.weight), wanted)


@torch.no_grad()
def test_activations_have_the_nearest_standard_form(w8a8, w4a4):
    """256 steps that reach from the least level to the greatest; a uniform quantizer of 8 bits stays what it is."""
    seen = set()
    for qmodel in (w8a8, w4a4):
        for _, quantizer in activation_quantizers(qmodel):
            stand_in = deploy_quantizer(quantizer)
            x = torch.linspace(-3, 3, 999)[:, None].repeat(1, len(getattr(quantizer, "labels", [0])))
            if has_standard_form(quantizer):
                assert torch.equal(stand_in(x), quantizer(x))
                continue
            seen.add(quantizer.family)
            levels = quantizer.decode(torch.arange(2**quantizer.bits)[:, None].expand(-1, x.shape[1]))
            step = float(stand_in.scale)
            assert step == pytest.approx(float(max(levels.max(), 0) - min(levels.min(), 0)) / 255, rel=1e-5)
            assert float((stand_in(levels) - levels).abs().max()) <= step
    assert seen == {"uniform", "cag", "hluq", "lnq"}


def test_no_weight_of_a_unit_is_stored_as_floats(w8a8, folder):
    """Every quantized layer's codes are an int8 initializer of its own; no float matrix of their shapes is left."""
    layers = weight_layers(w8a8)
    for part, file in (("image_encoder", ENCODER_FILE), ("mask_decoder", DECODER_FILE)):
        onnx.checker.check_model(str(folder / file), full_check=True)
        tensors = stored(folder / file)
        codes = Counter(a.shape for kind, a in tensors.values() if kind == onnx.TensorProto.INT8 and a.ndim > 1)
        mine = {name: layer for name, layer in layers.items() if name.startswith(part)}
        linear = [tuple(layer.weight.shape)[::-1] for layer in mine.values() if layer.weight.ndim == 2]
        assert codes == Counter([*linear, *(tuple(x.weight.shape) for x in mine.values() if x.weight.ndim == 4)])
        floats = [a for kind, a in tensors.values() if kind == onnx.TensorProto.FLOAT]
        for layer in mine.values():
            weight = layer.weight.detach().numpy()
            assert not any(
                a.size == weight.size and np.allclose(np.sort(a, None), np.sort(weight, None), atol=0.05 * weight.std())
                for a in floats
            )


def test_onnxruntime_multiplies_integers(w8a8, folder, tmp_path):
    """All Linear layers, and all products of activations of the encoder, are integer kernels; convolutions are not."""
    for file, left in ((ENCODER_FILE, 0), (DECODER_FILE, None)):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / file)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(tmp_path / file).graph.node
        counts = Counter(node.op_type for node in nodes)
        part = file.removesuffix(".onnx")
        linear = [n for n, x in weight_layers(w8a8).items() if n.startswith(part) and x.weight.ndim == 2]
        assert counts["MatMulIntegerToFloat"] + counts["QLinearMatMul"] >= len(linear)
        if left is not None:
            assert counts["MatMul"] + counts["FusedMatMul"] + counts["Gemm"] == left


@torch.no_grad()
def test_the_graphs_compute_what_the_model_in_qdq_form_does(w8a8, driver):
    """And that is near the fake-quantized one: weights rounded to int8 once more, nothing else."""
    form = deploy_model(w8a8)
    for item in make_tiny_items():
        wanted = w8a8.image_encoder(item["image"])
        (found,) = driver.encoder({"image": item["image"].numpy()})
        assert error(found, form.image_encoder(item["image"])) < 0.01
        assert error(found, wanted) < 0.03
        masks, quality = driver(item)
        logits, scores = box_forward(w8a8, item)
        assert masks.shape == logits.shape and quality.shape == scores.shape
        assert error(masks, logits) < 0.05


PROMPTS = {
    "points": {"points": True},
    "points and boxes": {"points": True, "boxes": True},
    "boxes": {"boxes": True},
    "a mask": {"mask": True},
    "all": {"points": True, "boxes": True, "mask": True},
    "nothing": {},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("multimask", [False, True])
def test_prompts_reach_the_decoder_as_in_pytorch(kind, multimask, w8a8, driver):
    generator = torch.Generator().manual_seed(3)
    given = PROMPTS[kind]
    points = 64 * torch.rand(2, 3, 2, generator=generator) if "points" in given else None
    labels = torch.tensor([[1, 0, 1], [0, 1, 1]]) if "points" in given else None
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [10.0, 3.0, 30.0, 22.0]]) if "boxes" in given else None
    side = 2 * w8a8.mask_decoder.iou_token.weight.shape[1]
    mask = 5 * torch.randn(2, 1, side, side, generator=generator) if "mask" in given else None
    embeddings = torch.randn(1, 16, 8, 8, generator=generator)
    decoder = deploy_model(w8a8)
    sparse, dense = decoder.prompt_encoder(None if points is None else (points, labels), boxes, mask)
    wanted = decoder.mask_decoder(embeddings, decoder.prompt_encoder.get_dense_pe(), sparse, dense, multimask)
    arrays = [None if x is None else x.numpy() for x in (points, labels, boxes, mask)]
    found = driver.decode(embeddings.numpy(), *arrays, multimask_output=multimask)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == tuple(b.shape)
        assert error(a, b) < 0.01


@pytest.mark.parametrize("shape", [(48, 64), (97, 33), (20, 20)])
def test_from_an_image_to_masks_as_sam_predictor(shape, driver, w8a8, monkeypatch):
    """With the graphs' own answers in the place of its model, SamPredictor gives the same masks."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    sam = make_tiny_sam()
    seen = []

    def encode(pixels):
        seen.append(pixels)
        return torch.from_numpy(driver.encoder({"image": pixels.numpy()})[0])

    monkeypatch.setattr(sam.image_encoder, "forward", encode)
    monkeypatch.setattr(sam.prompt_encoder, "forward", lambda points, boxes, masks: ((points, boxes, masks), None))

    def decode(image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output):
        points, boxes, masks = sparse_prompt_embeddings
        arrays = [*(points or (None, None)), boxes, masks]
        arrays = [None if x is None else x.numpy() for x in arrays]
        return tuple(map(torch.from_numpy, driver.decode(image_embeddings.numpy(), *arrays, multimask_output)))

    monkeypatch.setattr(sam.mask_decoder, "forward", decode)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    driver.set_image(image)
    assert np.allclose(driver.embeddings, predictor.features.numpy(), atol=1e-5)
    height, width = shape
    for prompts in (
        {"point_coords": np.array([[width / 2, height / 3], [1.0, 2.0]]), "point_labels": np.array([1, 0])},
        {"box": np.array([2.0, 3.0, width - 4.0, height - 5.0]), "multimask_output": False},
    ):
        wanted = predictor.predict(**prompts, return_logits=True)
        found = driver.predict(**prompts, return_logits=True)
        for a, b in zip(found, wanted, strict=True):
            assert a.shape == b.shape and np.allclose(a, b, atol=1e-3 * np.abs(b).max())
        again = driver.predict(mask_input=found[2][:1], **prompts)
        assert again[0].dtype == bool and np.allclose(
            again[2], predictor.predict(mask_input=wanted[2][:1], **prompts)[2], atol=1e-3
        )


def test_the_json_says_what_the_model_says(folder, w8a8):
    content = json.loads((folder / BUNDLE_FILE).read_text())
    assert content["preprocessing"]["image_size"] == 64 and content["style"] == "deploy"
    assert content["preprocessing"]["pixel_mean"] == w8a8.pixel_mean.flatten().tolist()
    assert content["bytes"] == {name: (folder / name).stat().st_size for name in (ENCODER_FILE, DECODER_FILE)}
    assert content["postprocessing"]["multiple_masks"] == [1, 4]
    note_parity(folder, [{"runtime": "x", "iou": 1.0}])
    noted, other = read_bundle(folder), content.pop("checksum")
    assert noted.pop("checksum") != other and noted == {**content, "parity": [{"runtime": "x", "iou": 1.0}]}
    note_parity(folder, [])


def test_damage_of_a_bundle_is_found(folder, tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    graph, words = copied / ENCODER_FILE, copied / BUNDLE_FILE
    for path, message in ((graph, "does not match its SHA-256 in bundle.json"), (words, "does not match its checksum")):
        good = path.read_bytes()
        place = good.index(b'"image_size": 64') + 14 if path == words else len(good) // 2
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(ValueError, match=message):
            OnnxSam(copied)
        path.write_bytes(good)
    graph.unlink()
    with pytest.raises(FileNotFoundError, match=r"image_encoder\.onnx, which bundle\.json names"):
        read_bundle(copied)


def test_int4_is_half_a_byte_and_computes_the_same(w4a4, tmp_path):
    for int4 in (False, True):
        export_onnx(w4a4, tmp_path / str(int4), style="deploy", int4=int4)
    wide, narrow = (stored(tmp_path / str(int4) / ENCODER_FILE) for int4 in (False, True))
    layers = [x for n, x in weight_layers(w4a4).items() if n.startswith("image_encoder")]
    packed = [a for kind, a in narrow.values() if kind == onnx.TensorProto.INT4 and a.ndim > 1]
    tensors = onnx.load(tmp_path / "True" / ENCODER_FILE).graph.initializer
    assert all(len(t.raw_data) == (np.prod(t.dims) + 1) // 2 for t in tensors if t.data_type == onnx.TensorProto.INT4)
    assert len(packed) == len(layers) and sum(a.size for a in packed) == sum(x.weight.numel() for x in layers)
    assert not any(kind == onnx.TensorProto.INT8 and a.ndim > 1 for kind, a in narrow.values())
    assert any(kind == onnx.TensorProto.INT8 for kind, _ in wide.values())
    onnx.checker.check_model(str(tmp_path / "True" / ENCODER_FILE), full_check=True)
    item = make_tiny_items()[0]
    found, other = (
        OnnxSam(tmp_path / str(int4), 1).encoder({"image": item["image"].numpy()})[0] for int4 in (False, True)
    )
    assert error(other, found) < 0.05


def test_a_model_in_floating_point_goes_into_the_same_graphs(tiny_sam, tmp_path):
    export_onnx(tiny_sam, tmp_path, style="float")
    item = make_tiny_items()[1]
    with torch.no_grad():
        wanted = box_forward(tiny_sam, item)
    for a, b in zip(OnnxSam(tmp_path, 1)(item), wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_shared_layers_are_replaced_under_all_names(w8a8):
    model = deploy_model(w8a8)
    assert not any(True for _ in quantizers(model))
    linear = [x for x in weight_layers(w8a8).values() if isinstance(x, torch.nn.Linear)]
    assert sum(isinstance(x, DeployLinear) for x in model.modules()) == len(linear)
    assert any(is_weight(q) for _, q in quantizers(w8a8)), "the model itself stays as it was"


def test_errors(driver, w8a8, tmp_path):
    with pytest.raises(ValueError, match="`style` must be one of exact, deploy, float, got 'fast'"):
        export_onnx(w8a8, tmp_path, style="fast")
    with pytest.raises(ValueError, match="this one is: use 'exact' or 'deploy'"):
        export_onnx(w8a8, tmp_path, style="float")
    with pytest.raises(ValueError, match="`int4` .* weights of 8 bits or more: leave it out"):
        export_onnx(w8a8, tmp_path, style="deploy", int4=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        OnnxSam(tmp_path)
    (tmp_path / BUNDLE_FILE).write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="its format is 'other'"):
        OnnxSam(tmp_path)
    with pytest.raises(ValueError, match="`runtime` must be one of onnxruntime, openvino, got 'tvm'"):
        onnx_runtimes.open_graph(tmp_path / ENCODER_FILE, "tvm")
    with pytest.raises(RuntimeError, match="call set_image first"):
        driver_without_image = object.__new__(OnnxSam)
        driver_without_image.embeddings = None
        driver_without_image.predict()
    driver.set_image(np.zeros((8, 8, 3), np.uint8))
    for name, value in {
        "box": [1, 2, 3],
        "point_coords": np.full((1, 2), np.nan),
        "point_labels": "x",
        "mask_input": np.zeros((2, 2)),
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must be .* finite numbers, got "):
            driver.predict(**{name: value})
    with pytest.raises(ValueError, match="belong together, got one of them"):
        driver.decode(np.zeros((1, 16, 8, 8), np.float32), points=np.zeros((1, 1, 2)))
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8 RGB, got \(8, 8\) float64"):
        driver.set_image(np.zeros((8, 8)))
    with pytest.raises(SpecError, match="not frozen"):
        unfrozen = copy.deepcopy(w8a8)
        next(q for _, q in quantizers(unfrozen)).enable_observer()
        export_onnx(unfrozen, tmp_path / "x", style="deploy")
