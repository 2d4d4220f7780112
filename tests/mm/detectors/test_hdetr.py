# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from ahcq_plugin.mm.detectors.hdetr import HDeformableDETR, HDeformableDETRHead, group_mask
from ahcq_plugin.zoo.scenes import box_of, render_scene

SIZE, FIRST, SECOND = 96, 20, 40
ATTENTION = dict(embed_dims=256, batch_first=True, dropout=0.0)
FFN = dict(embed_dims=256, feedforward_channels=64, ffn_drop=0.0)
SMALL = dict(
    data_preprocessor=dict(type="DetDataPreprocessor"),
    num_queries=FIRST,
    as_two_stage=True,
    with_box_refine=True,
    backbone=dict(type="ResNet", depth=18, base_channels=8, out_indices=(1, 2, 3)),
    neck=dict(
        type="ChannelMapper",
        in_channels=[16, 32, 64],
        kernel_size=1,
        out_channels=256,
        act_cfg=None,
        norm_cfg=dict(type="GN", num_groups=32),
        num_outs=4,
    ),
    encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=ATTENTION, ffn_cfg=FFN)),
    decoder=dict(
        num_layers=2,
        return_intermediate=True,
        layer_cfg=dict(self_attn_cfg=dict(ATTENTION, num_heads=8), cross_attn_cfg=ATTENTION, ffn_cfg=FFN),
        post_norm_cfg=None,
    ),
    positional_encoding=dict(num_feats=128, normalize=True, offset=-0.5),
    bbox_head=dict(
        num_classes=3,
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0),
        loss_bbox=dict(type="L1Loss", loss_weight=5.0),
        loss_iou=dict(type="GIoULoss", loss_weight=2.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type="HungarianAssigner",
            match_costs=[
                dict(type="FocalLossCost", weight=2.0),
                dict(type="BBoxL1Cost", weight=5.0, box_format="xywh"),
                dict(type="IoUCost", iou_mode="giou", weight=2.0),
            ],
        )
    ),
    test_cfg=dict(max_per_img=10),
)
OFF = dict(num_queries_one2many=0, mixed_selection=False, look_forward_twice=False)


def build(kind="HDeformableDETR", head=None, **options):
    config = copy.deepcopy(SMALL) | dict(type=kind) | options
    config["bbox_head"] = config["bbox_head"] | dict(type=f"{kind}Head") | (head or {})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS.build(config)
        model.init_weights()
        for parameter in model.parameters():  # many start at zero; a model with structure everywhere tests more
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def hybrid(**options):
    return build(**dict(num_queries_one2many=SECOND) | options)


@pytest.fixture(scope="module")
def batch():
    """Two generated images (2, 3, 96, 96), normalised, of which the second is narrower, and their objects."""
    images, samples = [], []
    for seed, width in ((0, SIZE), (1, 72)):
        pixels, masks = render_scene(seed, SIZE)
        image = (torch.from_numpy(pixels).permute(2, 0, 1).float() - 120) / 60
        image[:, :, width:] = 0
        images.append(image)
        boxes = torch.tensor([box_of(m[:, :width]) for m in masks if m[:, :width].any()][:4], dtype=torch.float32)
        instances = InstanceData(bboxes=boxes, labels=torch.arange(len(boxes)) % 3)
        meta = dict(img_shape=(SIZE, width), batch_input_shape=(SIZE, SIZE), ori_shape=(SIZE, width), img_id=seed)
        samples.append(DetDataSample(metainfo=meta | dict(scale_factor=(1.0, 1.0)), gt_instances=instances))
    return torch.stack(images), samples


def outputs(model, batch):
    """(scores, boxes) of every decoder layer, and the losses if the model trains."""
    images, samples = batch
    features = model.forward_transformer(model.extract_feat(images), samples)
    return model.bbox_head(features["hidden_states"], features["references"])


@pytest.mark.parametrize("training", [False, True])
def test_without_its_extra_parts_it_is_mmdets_deformable_detr(batch, training):
    ours, theirs = build(**OFF).train(training), build("DeformableDETR").train(training)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for model in (ours, theirs):
        model.backbone.eval()
    with torch.no_grad():
        assert all(map(torch.equal, outputs(ours, batch), outputs(theirs, batch)))
        if training:
            losses, expected = ours.loss(*batch), theirs.loss(*batch)
            assert losses.keys() == expected.keys() and all(torch.equal(losses[k], expected[k]) for k in losses)
        else:
            for found, same in zip(
                *(m.predict(batch[0], copy.deepcopy(batch[1])) for m in (ours, theirs)), strict=True
            ):
                assert torch.equal(found.pred_instances.bboxes, same.pred_instances.bboxes)
                assert torch.equal(found.pred_instances.scores, same.pred_instances.scores)


def test_inference_is_the_first_group_of_training(batch):
    model = hybrid()
    with torch.no_grad():
        scores, boxes = outputs(model, batch)
        model.train().backbone.eval()
        all_scores, all_boxes = outputs(model, batch)
    assert scores.shape == (2, 2, FIRST, 3) and all_scores.shape == (2, 2, FIRST + SECOND, 3)
    torch.testing.assert_close(all_scores[:, :, :FIRST], scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(all_boxes[:, :, :FIRST], boxes, rtol=1e-4, atol=1e-5)


def test_the_groups_do_not_see_each_other(batch):
    model = hybrid().train()
    model.backbone.eval()
    with torch.no_grad():
        before = outputs(model, batch)[0]
        model.query_embedding.weight[FIRST:] += 1.0
        after = outputs(model, batch)[0]
        model.query_embedding.weight[:FIRST] += 1.0
        last = outputs(model, batch)[0]
    torch.testing.assert_close(before[:, :, :FIRST], after[:, :, :FIRST], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after[:, :, FIRST:], last[:, :, FIRST:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[:, :, FIRST:], after[:, :, FIRST:], atol=1e-2)
    assert not torch.allclose(after[:, :, :FIRST], last[:, :, :FIRST], atol=1e-2)


def test_the_mask_of_a_hand_made_case():
    expected = torch.tensor([[0, 0, 1], [0, 0, 1], [1, 1, 0]], dtype=torch.bool)
    assert torch.equal(group_mask(2, 3), expected)
    assert group_mask(3, 3) is None


@pytest.fixture
def hand_made():
    """A model whose encoder scores are the first feature of a point and whose boxes are the proposals; its memory."""
    model = hybrid(num_queries=3, num_queries_one2many=2)
    last = model.decoder.num_layers
    with torch.no_grad():
        torch.nn.init.eye_(model.memory_trans_fc.weight)
        model.memory_trans_fc.bias.zero_()
        model.bbox_head.cls_branches[last].weight.zero_()
        model.bbox_head.cls_branches[last].weight[0, 0] = 1
        model.bbox_head.cls_branches[last].weight[1, 1] = 100  # another class must not matter
        for parameter in model.bbox_head.reg_branches[last][-1].parameters():
            parameter.zero_()
    model.memory_trans_norm = torch.nn.Identity()
    memory = torch.zeros(1, 10, 256)
    memory[0, :, 0] = torch.tensor([0.0, 5.0, 1.0, 4.0, 2.0, 3.0, -1.0, -2.0, -3.0, -4.0])
    memory[0, :, 1] = torch.arange(10.0)
    return model, memory, torch.tensor([[2, 3], [2, 2]])


@pytest.mark.parametrize("training", [False, True])
def test_the_best_proposals_become_queries_in_order(hand_made, training):
    model, memory, shapes = hand_made
    decoder_inputs, _ = model.train(training).pre_decoder(memory, None, shapes)
    # points of the first level: 2 rows of 3, side 0.05; scores 5, 4, 3, 2, 1 at points 1, 3, 5, 4, 2
    centres = [(3 / 6, 1 / 4), (1 / 6, 3 / 4), (5 / 6, 3 / 4), (3 / 6, 3 / 4), (5 / 6, 1 / 4)]
    expected = torch.tensor([[(x, y, 0.05, 0.05) for x, y in centres[: 5 if training else 3]]])
    torch.testing.assert_close(decoder_inputs["reference_points"], expected)
    assert torch.equal(decoder_inputs["query"][0], model.query_embedding.weight[: 5 if training else 3])


def test_mixed_selection_takes_positions_from_proposals_and_content_from_the_model(batch):
    mixed, plain = hybrid(), hybrid(mixed_selection=False)
    assert mixed.query_embedding.weight.shape == (FIRST + SECOND, 256) and not hasattr(plain, "query_embedding")
    plain.load_state_dict(mixed.state_dict(), strict=False)
    images, samples = batch
    with torch.no_grad():
        inputs, _ = mixed.pre_transformer(mixed.extract_feat(images), samples)
        encoded = mixed.forward_encoder(**inputs)
        mixed_inputs, plain_inputs = mixed.pre_decoder(**encoded)[0], plain.pre_decoder(**encoded)[0]
    assert torch.equal(mixed_inputs["query_pos"], plain_inputs["query_pos"])
    assert torch.equal(mixed_inputs["query"][0], mixed_inputs["query"][1])
    assert not torch.equal(mixed_inputs["query"], plain_inputs["query"])


def test_looking_forward_twice_changes_gradients_and_no_value(batch):
    gradients = []
    for option in (False, True):
        model = hybrid(look_forward_twice=option).train()
        model.backbone.eval()
        features = model.forward_transformer(model.extract_feat(batch[0]), batch[1])
        _, boxes = model.bbox_head(features["hidden_states"], features["references"])
        weights = list(model.bbox_head.reg_branches[0].parameters())  # of the first of two layers
        slopes = torch.autograd.grad(boxes[1].sum(), weights)
        gradients.append((boxes.detach(), features["references"][1].requires_grad, [bool(g.any()) for g in slopes]))
    (boxes, once, reached), (same_boxes, twice, reached_twice) = gradients
    assert torch.equal(boxes, same_boxes)
    assert (once, twice) == (False, True)
    assert not any(reached) and all(reached_twice)


def test_the_second_group_sees_every_object_several_times(batch):
    model = hybrid(head=dict(k_one2many=3, lambda_one2many=0.5)).train()
    model.backbone.eval()
    calls = []
    original = HDeformableDETRHead.loss_by_feat

    def spy(self, scores, boxes, enc_scores, enc_boxes, objects, metas):
        losses = original(self, scores, boxes, enc_scores, enc_boxes, objects, metas)
        calls.append((scores.shape[2], enc_scores is None, [len(o) for o in objects], losses))
        return losses

    model.bbox_head.loss_by_feat = spy.__get__(model.bbox_head)
    losses = model.loss(*batch)
    counts = [len(sample.gt_instances) for sample in batch[1]]
    assert [call[:3] for call in calls] == [(FIRST, False, counts), (SECOND, True, [3 * n for n in counts])]
    for name, value in calls[1][3].items():
        assert torch.equal(losses[f"{name}_one2many"], 0.5 * value)
    assert losses.keys() == calls[0][3].keys() | {f"{name}_one2many" for name in calls[1][3]}
    assert {"loss_cls", "d0.loss_bbox", "enc_loss_iou"} <= losses.keys() and "enc_loss_cls_one2many" not in losses


def test_the_loss_falls_on_two_images(batch):
    model = hybrid().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    totals = []
    for _ in range(8):
        losses = model.loss(*batch)
        total = sum(value for name, value in losses.items())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append((total.item(), sum(v.item() for k, v in losses.items() if k.endswith("_one2many"))))
    assert totals[-1][0] < 0.8 * totals[0][0]
    assert totals[-1][1] < 0.8 * totals[0][1], "the second group learns, too"


def test_what_it_cannot_be_is_refused(batch):
    for key in ("with_box_refine", "as_two_stage"):
        with pytest.raises(ValueError, match="use mmdet's DeformableDETR"):
            build(**{key: False})
    with pytest.raises(ValueError, match="`num_queries_one2many` must be an integer of at least 0, got -1"):
        build(num_queries_one2many=-1)
    with pytest.raises(ValueError, match="`k_one2many` must be a positive integer, got 0"):
        build(head=dict(k_one2many=0))
    few = hybrid(num_queries=400)
    with pytest.raises(ValueError, match="400 queries, but the image has only 193 feature points"):
        outputs(few, batch)


def test_mmdets_registry_knows_it():
    assert MODELS.get("HDeformableDETR") is HDeformableDETR
