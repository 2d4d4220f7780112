# SPDX-License-Identifier: Apache-2.0
"""H-Deformable-DETR (Jia et al. 2023, "DETRs with Hybrid Matching") on MMDetection's two-stage Deformable DETR.

In training a second group of queries sees every object ``k_one2many`` times; attention between the groups is blocked,
so inference simply leaves that group out. With all extra parts off, what is left is MMDetection's Deformable DETR.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmdet.models.dense_heads import DeformableDETRHead
from mmdet.models.detectors import DeformableDETR
from mmdet.models.layers import inverse_sigmoid
from mmdet.registry import MODELS
from mmdet.structures import SampleList
from mmengine.structures import InstanceData
from torch import Tensor, nn


@MODELS.register_module()
class HDeformableDETR(DeformableDETR):
    """Two-stage Deformable DETR with box refinement and a hybrid branch.

    Args:
        num_queries: one-to-one queries, the only ones in inference.
        num_queries_one2many: further queries in training; 0: no hybrid branch.
        mixed_selection: the queries' content is learned and only their positions come from the encoder's proposals;
            without it both do.
        look_forward_twice: the loss of a decoder layer also reaches the layer before it, through the box that it
            refines. It changes gradients only.
        bbox_head: config of :class:`HDeformableDETRHead`; it is told the number of one-to-one queries.
        args, kwargs: of mmdet's ``DeformableDETR``; ``with_box_refine`` and ``as_two_stage`` must be True.
    """

    def __init__(
        self,
        *args: Any,
        bbox_head: Mapping[str, Any],
        num_queries: int = 300,
        num_queries_one2many: int = 1500,
        mixed_selection: bool = True,
        look_forward_twice: bool = True,
        with_box_refine: bool = True,
        as_two_stage: bool = True,
        **kwargs: Any,
    ):
        if not (with_box_refine and as_two_stage):
            raise ValueError(
                "HDeformableDETR is two-stage with box refinement: `with_box_refine` and `as_two_stage` must be True, "
                f"got {with_box_refine!r} and {as_two_stage!r}; for the others use mmdet's DeformableDETR"
            )
        for key, value, least in (("num_queries", num_queries, 1), ("num_queries_one2many", num_queries_one2many, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"HDeformableDETR: `{key}` must be an integer of at least {least}, got {value!r}")
        self.num_queries_one2many = num_queries_one2many
        self.mixed_selection, self.look_forward_twice = mixed_selection, look_forward_twice
        super().__init__(
            *args,
            bbox_head={**bbox_head, "num_queries_one2one": num_queries},
            num_queries=num_queries,
            with_box_refine=True,
            as_two_stage=True,
            **kwargs,
        )

    @property
    def num_queries(self) -> int:
        """Queries in use, which mmdet's code asks for: those of both groups in training, else the one-to-one ones."""
        return self.num_queries_one2one + (self.num_queries_one2many if self.training else 0)

    @num_queries.setter
    def num_queries(self, value: int) -> None:  # mmdet's constructor sets it
        self.num_queries_one2one = value

    def _init_layers(self) -> None:
        super()._init_layers()
        if self.mixed_selection:
            self.query_embedding = nn.Embedding(self.num_queries_one2one + self.num_queries_one2many, self.embed_dims)

    def pre_decoder(
        self, memory: Tensor, memory_mask: Tensor | None, spatial_shapes: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The highest-scoring proposals become queries, in the order of their scores; see mmdet's method."""
        points = memory.shape[1]
        if points < self.num_queries:
            raise ValueError(
                f"HDeformableDETR: {self.num_queries} queries, but the image has only {points} feature points; "
                "use larger images or fewer queries"
            )
        decoder_inputs, head_inputs = super().pre_decoder(memory, memory_mask, spatial_shapes)
        if self.mixed_selection:
            content = self.query_embedding.weight[: self.num_queries]
            decoder_inputs["query"] = content.expand(len(memory), -1, -1)
        return decoder_inputs, head_inputs

    def forward_decoder(
        self,
        query: Tensor,
        query_pos: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None,
        reference_points: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        valid_ratios: Tensor,
    ) -> dict[str, Any]:
        """Decoder with separate groups of queries; arguments and result as of mmdet's method."""
        branches = self.bbox_head.reg_branches
        states, refined = self.decoder(
            query=query,
            value=memory,
            query_pos=query_pos,
            key_padding_mask=memory_mask,
            reference_points=reference_points,
            spatial_shapes=spatial_shapes,
            level_start_index=level_start_index,
            valid_ratios=valid_ratios,
            reg_branches=branches,
            self_attn_mask=group_mask(self.num_queries_one2one, query.shape[1], query.device),
        )
        references = [reference_points, *refined]
        if self.look_forward_twice and self.training:
            # The decoder hands on boxes without gradient. The same boxes again, with the gradient of their own layer:
            again = [
                (branch(state) + inverse_sigmoid(box)).sigmoid()
                for branch, state, box in zip(branches[: len(states)], states, references[:-1], strict=True)
            ]
            references = [reference_points, *again]
        return dict(hidden_states=states, references=references)


def group_mask(first: int, total: int, device: torch.device | str = "cpu") -> Tensor | None:
    """Blocked self-attention between the first ``first`` queries and the others: bool (total, total), True = blocked.

    None when there is one group only.
    """
    if first >= total:
        return None
    other = torch.arange(total, device=device) >= first
    return other[:, None] != other


@MODELS.register_module()
class HDeformableDETRHead(DeformableDETRHead):
    """Head whose loss matches one-to-one in the first group of queries and one-to-many in the second.

    Args:
        num_queries_one2one: size of the first group; set by the detector.
        k_one2many: how often each object is repeated for the second group.
        lambda_one2many: weight of the second group's losses.
        args, kwargs: of mmdet's ``DeformableDETRHead``.
    """

    def __init__(
        self,
        *args: Any,
        num_queries_one2one: int = 300,
        k_one2many: int = 6,
        lambda_one2many: float = 1.0,
        **kwargs: Any,
    ):
        if not isinstance(k_one2many, int) or k_one2many < 1:
            raise ValueError(f"HDeformableDETRHead: `k_one2many` must be a positive integer, got {k_one2many!r}")
        self.num_queries_one2one = num_queries_one2one
        self.k_one2many, self.lambda_one2many = k_one2many, lambda_one2many
        super().__init__(*args, **kwargs)

    def loss(
        self,
        hidden_states: Tensor,
        references: list[Tensor],
        enc_outputs_class: Tensor,
        enc_outputs_coord: Tensor,
        batch_data_samples: SampleList,
    ) -> dict[str, Tensor]:
        """Losses of the first group and the encoder as mmdet's head names them, those of the second with ``_one2many``.

        Shapes as of mmdet's method; the queries' axis holds both groups.
        """
        metas = [sample.metainfo for sample in batch_data_samples]
        objects = [sample.gt_instances for sample in batch_data_samples]
        scores, boxes = self(hidden_states, references)
        first, second = slice(None, self.num_queries_one2one), slice(self.num_queries_one2one, None)
        losses = self.loss_by_feat(
            scores[:, :, first], boxes[:, :, first], enc_outputs_class, enc_outputs_coord, objects, metas
        )
        if scores.shape[2] > self.num_queries_one2one:
            repeated = [_repeated(instances, self.k_one2many) for instances in objects]
            more = self.loss_by_feat(scores[:, :, second], boxes[:, :, second], None, None, repeated, metas)
            losses.update({f"{name}_one2many": value * self.lambda_one2many for name, value in more.items()})
        return losses


def _repeated(instances: InstanceData, times: int) -> InstanceData:
    return InstanceData(bboxes=instances.bboxes.repeat(times, 1), labels=instances.labels.repeat(times))
