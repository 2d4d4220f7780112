# SPDX-License-Identifier: Apache-2.0
"""The ONNX graphs in onnxruntime against the fake-quantized model in PyTorch.

In float32 the encoder's last bits differ between the two, a code on the edge of a level flips now and then, and the
change spreads, as it does in PyTorch when the last bit of the image changes. So the graphs are compared where that
cannot happen: the decoder from one embedding, each unit by its share of differing outputs, and everything once more
with float64 between the quantizers.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ahcq_plugin import quantize
from ahcq_plugin.export import onnx_graphs
from ahcq_plugin.export.compare import mask_overlap
from ahcq_plugin.export.onnx_bundle import DECODER_FILE, ENCODER_FILE
from ahcq_plugin.export.onnx_graphs import export_onnx, onnx_model
from ahcq_plugin.export.onnx_quantizers import StoredWeight, TableLookup, UniformQDQ, onnx_quantizer
from ahcq_plugin.export.onnx_sam import OnnxSam
from ahcq_plugin.ptq import Recipe, calibrate, prepare
from ahcq_plugin.ptq.prepared import quantizers
from ahcq_plugin.quantizers import UniformFakeQuantize
from ahcq_plugin.quantizers.head_axis import HeadAxis
from ahcq_plugin.zoo.items import coco_items
from ahcq_plugin.zoo.sam import box_forward
from tests.packaged import batches


@pytest.fixture(scope="module")
def folder(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx")
    export_onnx(quantized, path)
    return path


@pytest.mark.parametrize(("axis", "shape"), [(0, (4, 3, 5)), (1, (2, 4, 3, 5)), (2, (2, 3, 4))])
def test_a_scale_for_each_head(axis, shape, tmp_path):
    quantizer = UniformFakeQuantize(quant_max=15, ch_axis=axis)
    quantizer.scale.data, quantizer.zero_point = torch.tensor([0.1, 0.3, 0.02, 1.0]), torch.tensor([3, 8, 0, 15]).int()
    quantizer.enable_fake_quant()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    onnx_graphs._write(onnx_quantizer(quantizer), (x,), tmp_path / "q.onnx", ["x"], ["y"], {})
    session = onnxruntime.InferenceSession(tmp_path / "q.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    assert torch.equal(torch.from_numpy(found), quantizer(x).detach())


@pytest.mark.parametrize(("heads", "shape"), [(HeadAxis(1, 3, 2), (2, 5, 12)), (HeadAxis(3, 3, 1), (6, 5, 4))])
def test_heads_along_a_part_of_an_axis(heads, shape, tmp_path):
    quantizer = UniformFakeQuantize(quant_max=15, per_head=True)
    quantizer.lay_out(heads)
    quantizer.scale.data, quantizer.zero_point = torch.tensor([0.1, 0.3, 0.02]), torch.tensor([3, 8, 0]).int()
    quantizer.enable_fake_quant()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    onnx_graphs._write(onnx_quantizer(quantizer), (x,), tmp_path / "q.onnx", ["x"], ["y"], {})
    session = onnxruntime.InferenceSession(tmp_path / "q.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    assert torch.equal(torch.from_numpy(found), quantizer(x).detach())


class QuadratureGELU(nn.Module):
    """GELU in float64 from exponentials (40 Gauss points): onnxruntime has no Erf in float64. Error below 1e-14."""

    def forward(self, x):
        nodes, weights = np.polynomial.legendre.leggauss(40)
        z = (x / math.sqrt(2)).clamp(-6, 6)
        total = 0.0
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            total = total + weight * torch.exp(-((z * (node + 1) / 2) ** 2))
        return x * 0.5 * (1 + z * total / math.sqrt(math.pi))


class UnfoldConv(nn.Module):
    """A convolution as a product of matrices: onnxruntime has no Conv in float64."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        conv = self.conv
        weight = conv.weight_fake_quant(conv.weight) if hasattr(conv, "weight_fake_quant") else conv.weight
        columns = F.unfold(x, conv.kernel_size, padding=conv.padding, stride=conv.stride)
        out = weight.flatten(1) @ columns
        if conv.bias is not None:
            out = out + conv.bias[:, None]
        side = x.shape[2] // conv.stride[0]
        return out.reshape(x.shape[0], -1, side, side)


class InSingle(nn.Module):
    """A quantizer that works in float32 inside a model of float64."""

    def __init__(self, quantizer):
        super().__init__()
        self.quantizer = quantizer.float()

    def forward(self, x):
        return self.quantizer(x.float()).double()


def in_double(model):
    """A part of ``onnx_model(...)`` with float64 between its quantizers, of operators that onnxruntime has in it."""
    model = model.double()
    for name, module in list(model.named_modules())[::-1]:  # a layer after what is inside of it
        replaced = None
        if isinstance(module, UniformQDQ | TableLookup | StoredWeight):
            replaced = InSingle(module)
        elif isinstance(module, nn.Conv2d):
            replaced = UnfoldConv(module)
        elif isinstance(module, nn.GELU):
            replaced = QuadratureGELU()
        if replaced is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replaced)
    return model


class Run(nn.Module):
    """A function of float64 arrays or tensors in the place of a part that computes in float32."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return tuple(torch.as_tensor(out).float() for out in self.function(*(arg.double() for arg in args)))


def session_of(model, args, path, inputs, outputs, dynamic):
    onnx_graphs._write(
        model, args, path, inputs, outputs, dict.fromkeys([*inputs, *outputs] if dynamic else [], {0: "n"})
    )
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@torch.no_grad()
def run_double(quantized, images, path):
    """IoU of all masks, flipped pixels and pixels of ONNX against PyTorch, both with float64 in the encoder and in the
    decoder's transformer: all that is quantized. In float32 a code on the edge of a level flips on some processors."""
    model, decoder = onnx_model(quantized), copy.deepcopy(quantized.mask_decoder)
    encoder, transformer = in_double(model.image_encoder), in_double(model.mask_decoder.transformer)
    see = session_of(encoder, (images[0]["image"].double(),), path / "e.onnx", ["image"], ["embeddings"], False)
    seen = []
    hook = decoder.transformer.register_forward_hook(lambda module, args, out: seen.append(args))
    decoded(quantized, decoder, encoder(images[0]["image"].double()).float(), images[0]["boxes"][:2])
    hook.remove()
    names = ["features", "positions", "tokens"], ["queries", "keys"]
    attend = session_of(transformer, tuple(arg.double() for arg in seen[0]), path / "t.onnx", *names, True)
    overlaps, flipped, pixels = [], 0, 0
    for batch in images:
        (found,) = see.run(None, {"image": batch["image"].double().numpy()})
        decoder.transformer = Run(transformer)
        masks = decoded(quantized, decoder, encoder(batch["image"].double()).float(), batch["boxes"])
        decoder.transformer = Run(
            lambda *args: attend.run(None, {k: arg.numpy() for k, arg in zip(names[0], args, strict=True)})
        )
        other = decoded(quantized, decoder, torch.from_numpy(found).float(), batch["boxes"])
        part, count = mask_overlap(masks, other)
        overlaps, flipped, pixels = overlaps + part.tolist(), flipped + count, pixels + masks.numel()
    return overlaps, flipped, pixels


def decoded(sam, decoder, embeddings, boxes):
    """Mask logits of ``decoder`` in the place of ``sam``'s."""
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
    return decoder(embeddings, sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=False)[0]


@pytest.mark.slow
def test_masks_equal_pytorch(quantized, scenes, tmp_path):
    overlaps, flipped, _ = run_double(quantized, scenes, tmp_path)
    assert np.mean(overlaps) >= 0.999 and flipped <= 5, (overlaps, flipped)


@pytest.mark.slow
def test_masks_equal_pytorch_on_16_photographs(quantized, shared_data, tmp_path, record_property):
    images = batches(quantized, coco_items(shared_data / "coco_val"), 16)
    overlaps, flipped, pixels = run_double(quantized, images, tmp_path)
    record_property("masks", (np.mean(overlaps), min(overlaps), flipped, pixels))
    assert np.mean(overlaps) >= 0.999, (np.mean(overlaps), flipped)


def test_the_decoder_from_one_embedding(quantized, folder, scenes):
    """Both in float32: three units are too few for a flipped code to matter."""
    sam = OnnxSam(folder, 1)
    for batch in scenes:
        with torch.no_grad():
            embeddings = quantized.image_encoder(batch["image"])
            wanted = box_forward(quantized, batch)
        masks, quality = map(torch.from_numpy, sam.decode(embeddings.numpy(), boxes=batch["boxes"].numpy()))
        overlaps, flipped = mask_overlap(wanted[0], masks)
        assert overlaps.mean() >= 0.999 and flipped <= 5, (overlaps, flipped)
        assert quality.shape == wanted[1].shape and (quality - wanted[1]).abs().max() < 1e-2


def test_both_graphs_in_single_precision(quantized, folder, scenes):
    """End to end masks stay near PyTorch's; the number of boxes is free."""
    sam = OnnxSam(folder, 1)
    for batch in scenes:
        batch = {**batch, "boxes": batch["boxes"][:3]}
        with torch.no_grad():
            wanted = box_forward(quantized, batch)[0]
        found, quality = sam(batch)
        assert found.shape == wanted.shape and quality.shape == (3, 1)
        assert mask_overlap(wanted, found)[0].mean() > 0.7


def test_modules_for_onnx_compute_the_same_bits(quantized, scenes):
    with torch.no_grad():
        wanted, found = box_forward(quantized, scenes[0]), box_forward(onnx_model(quantized), scenes[0])
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize(
    "recipe",
    [
        {"name": "rtn", "agq": True, "families": {"post_act": "power_of_two"}},
        {"name": "rtn", "w_bits": 8, "a_bits": 8, "cag": True, "hluq": True, "lnq": True},
        {"name": "rtn", "w_bits": 3, "a_bits": 5, "cag": True, "families": {"k": "lnq", "mlp_in": "hluq"}},
    ],
    ids=["agq", "w8a8", "odd"],
)
def test_onnxruntime_quantizes_to_the_same_bits(recipe, tiny_sam, tiny_items, tmp_path):
    """Every quantizer alone, on its own range, its boundaries and their neighbours."""
    qmodel, _ = quantize(tiny_sam, tiny_items, recipe, forward=box_forward, progress=False)
    stand_ins = dict(onnx_model(qmodel).named_modules())
    seen = set()
    for name, quantizer in quantizers(qmodel):
        module = stand_ins[name]
        if isinstance(module, StoredWeight) or quantizer.family in seen:
            continue
        seen.add(quantizer.family)
        channels = len(quantizer.params().scale) if quantizer.family == "cag" else 4
        codes = torch.arange(2**quantizer.bits)[:, None].expand(-1, channels)
        levels = quantizer.decode(codes).detach()
        halves = (levels[1:] + levels[:-1]) / 2
        edges = [halves] if isinstance(module, UniformQDQ) else [module.boundaries[:, None].expand(-1, channels)]
        values = torch.cat([levels, *edges, 3 * levels])
        values = torch.cat([torch.nextafter(values, torch.tensor(end)) for end in (-math.inf, math.inf)] + [values])
        onnx_graphs._write(module, (values,), tmp_path / "q.onnx", ["x"], ["y"], {})
        session = onnxruntime.InferenceSession(str(tmp_path / "q.onnx"), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"x": values.numpy()})
        assert torch.equal(torch.from_numpy(found), quantizer(values)), name
    assert len(seen) >= 3


def test_graphs_hold_codes_and_qdq(folder, spec):
    """Weights are stored as uint8 codes; every uniform or grouped quantizer is QDQ."""
    for file in (ENCODER_FILE, DECODER_FILE):
        graph = onnx.load(folder / file).graph
        onnx.checker.check_model(str(folder / file))
        counts = {op: sum(node.op_type == op for node in graph.node) for op in ("QuantizeLinear", "DequantizeLinear")}
        assert counts["QuantizeLinear"] == counts["DequantizeLinear"] > 20
        part = "image_encoder" if file == ENCODER_FILE else "mask_decoder"
        wanted = sum(m.right.codes.size for u, m in spec.matmuls() if u.name.startswith(part) and m.kind == "linear")
        stored = sum(np.prod(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.UINT8)
        assert stored >= wanted


def test_errors(tiny_sam, tiny_items, tmp_path, monkeypatch):
    prepare(tiny_sam, Recipe.from_config("rtn"))
    calibrate(tiny_sam, tiny_items, box_forward, progress=False)
    with pytest.raises(ValueError, match="the model is not frozen .*quantization is off"):
        export_onnx(tiny_sam, tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(onnx_graphs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ahcq_plugin\[onnx\]'"):
        export_onnx(tiny_sam, tmp_path)
