# SPDX-License-Identifier: Apache-2.0
"""FocalNet (Yang et al. 2022, "Focal Modulation Networks") as a backbone of MMDetection's detectors; timm's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn


@MODELS.register_module()
class TimmFocalNet(BaseModule):
    """The stages of ``timm.models.focalnet.FocalNet``, each with a norm of its own on the way out.

    Args:
        out_indices: stages whose maps are given out.
        init_cfg: as of MMEngine's modules.
        options: of timm's FocalNet. With ``use_overlap_down`` the stem pads by 3 as in the detectors' code, not by 2 as
            in timm's, which is for classification.

    Raises:
        ImportError: timm is not installed.
    """

    def __init__(self, out_indices: Sequence[int] = (0, 1, 2, 3), init_cfg: Any = None, **options: Any):
        super().__init__(init_cfg)
        try:
            from timm.layers import LayerNorm2d
            from timm.models.focalnet import FocalNet
        except ImportError as error:
            raise ImportError("TimmFocalNet needs timm: pip install -c constraints.txt timm") from error
        net = FocalNet(num_classes=0, **options)
        self.stem, self.layers = net.stem, net.layers
        if options.get("use_overlap_down"):
            self.stem.proj.padding = (3, 3)
        self.out_indices = tuple(out_indices)
        self.norms = nn.ModuleDict({str(i): LayerNorm2d(net.embed_dim[i], eps=1e-5) for i in self.out_indices})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps (B, C, H, W) at strides 4, 8, 16, 32 of images (B, 3, H, W)."""
        x, maps = self.stem(x), []
        for index, stage in enumerate(self.layers):
            x = stage(x)
            if index in self.out_indices:
                maps.append(self.norms[str(index)](x))
        return tuple(maps)
