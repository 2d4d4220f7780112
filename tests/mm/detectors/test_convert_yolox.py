# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ahcq_plugin.mm import BoxPromptedSAM
from ahcq_plugin.mm.detectors.convert_yolox import (
    build_yolox,
    conv_names,
    convert_state_dict,
    convert_yolox,
    read_convs,
)
from ahcq_plugin.mm.evaluation.image_evaluation import box_ap
from ahcq_plugin.mm.evaluation.records import read_records
from ahcq_plugin.support.cache import Cache


@pytest.fixture(scope="module")
def yolox():
    torch.manual_seed(0)
    model = build_yolox()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def outputs(model, image):
    with torch.no_grad():
        cls, reg, obj = model.bbox_head(model.extract_feat(image))
    levels = [torch.cat([reg[i], obj[i].sigmoid(), cls[i].sigmoid()], 1).flatten(2) for i in range(3)]
    return torch.cat(levels, 2).transpose(1, 2)


def test_every_convolution_has_its_place(yolox):
    names = conv_names(yolox)
    convs = [name for name, module in yolox.named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert sorted(names) == sorted(convs) and len(names) == 113


def test_folded_weights_give_the_outputs_of_the_unfolded_model(yolox):
    modules, convs = dict(yolox.named_modules()), []
    for name in conv_names(yolox):
        conv, norm = modules[name], modules.get(name.removesuffix("conv") + "bn")
        if conv.bias is None:
            fused = fuse_conv_bn_weights(
                conv.weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            convs.append(tuple(t.detach() for t in fused))
        else:
            convs.append((conv.weight.detach(), conv.bias.detach()))
    folded = build_yolox()
    folded.load_state_dict(convert_state_dict(convs, yolox), strict=True)
    image = torch.rand(1, 3, 96, 96) * 255
    torch.testing.assert_close(outputs(folded, image), outputs(yolox, image), rtol=1e-3, atol=1e-4)


def test_another_size_is_refused(yolox):
    convs = [(torch.zeros(1, 1, 1, 1), torch.zeros(1))] * 113
    with pytest.raises(ValueError, match="has 112 convolutions, the mmdet model 113"):
        convert_state_dict(convs[1:], yolox)
    with pytest.raises(ValueError, match=r"backbone.stem.conv.conv: the ONNX weight has shape \(1, 1, 1, 1\)"):
        convert_state_dict(convs, yolox)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no ONNX file .*x.onnx"):
        read_convs(tmp_path / "x.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="bad.onnx is not an ONNX file"):
        read_convs(tmp_path / "bad.onnx")


@pytest.fixture(scope="module")
def converted(shared_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("yolox") / "yolox_nano.pth"
    assert convert_yolox(shared_data / "yolox_nano" / "yolox_nano.onnx", path) == 113
    model = build_yolox()
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
    return model


def test_the_converted_model_computes_what_the_onnx_graph_does(shared_data, converted):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(shared_data / "yolox_nano" / "yolox_nano.onnx")
    image = torch.rand(1, 3, 416, 416, generator=torch.Generator().manual_seed(0)) * 255
    expected = session.run(None, {"images": image.numpy()})[0]
    torch.testing.assert_close(outputs(converted, image), torch.from_numpy(expected), rtol=1e-3, atol=1e-4)


def test_box_ap_agrees_with_the_onnx_models_own_detections(shared_data, converted, tiny_sam, coco_val_loader):
    dataset = coco_val_loader.dataset
    precision = {}
    for prompts in ("detector", str(shared_data / "coco_val" / "yolox_nano_bbox.json")):
        model = BoxPromptedSAM(tiny_sam, converted, prompts, score_thr=0.01, cat_ids=dataset.cat_ids)
        records = read_records(coco_val_loader, model, Cache(None))
        precision[prompts] = box_ap(records, dataset.metainfo, dataset.ann_file)["AP"]
    ours, onnx = precision.values()
    assert onnx > 0.25 and ours == pytest.approx(onnx, abs=0.005)
