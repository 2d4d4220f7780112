# SPDX-License-Identifier: Apache-2.0
"""Full-size SAMs on the meta device (tracing runs nothing) and blocks with structure in every parameter."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from ahcq_plugin.graph import describe


def role_counts(model: nn.Module) -> dict[str, dict[str, int]]:
    """Number of tensors by unit and role."""
    counted: dict[str, Counter[str]] = {}
    for row in describe(model):
        counted.setdefault(row.unit, Counter())[row.role] += 1
    return {unit: dict(roles) for unit, roles in counted.items()}


def _meta_sam(name: str) -> nn.Module:
    segment_anything = pytest.importorskip("segment_anything")
    with torch.device("meta"):
        return segment_anything.sam_model_registry[name]().eval()


@pytest.fixture(scope="session")
def sam_b() -> nn.Module:
    return _meta_sam("vit_b")


@pytest.fixture(scope="session")
def sam_l() -> nn.Module:
    return _meta_sam("vit_l")


@pytest.fixture(scope="session")
def vit_tiny() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()


@pytest.fixture
def randomized():
    """A function that fills every parameter with seeded noise (SAM starts its position tables at zero)."""

    def fill(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return module.eval()

    return fill
