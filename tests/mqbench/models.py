# SPDX-License-Identifier: Apache-2.0
"""Small models, data and settings that the tests of the MQBench plugin share; needs no MQBench."""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn

WIDTH = 32
TOKENS = 16
PATCH = 48


class Attention(nn.Module):
    """Separate q, k, v; sizes read off the input, as most code does."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (f(x).reshape(batch, tokens, 2, width // 2).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * (WIDTH // 2) ** -0.5, dim=-1)
        return self.proj(torch.matmul(weights, v).transpose(1, 2).flatten(2))


class FusedAttention(nn.Module):
    """q, k, v from one Linear."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * (WIDTH // 2) ** -0.5, dim=-1)
        return self.proj(torch.matmul(weights, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, attention: type[nn.Module] = Attention):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), attention(), nn.LayerNorm(WIDTH)
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """(B, TOKENS, PATCH) patches -> (B, TOKENS, 10)."""

    def __init__(self, attention: type[nn.Module] = Attention, depth: int = 2):
        super().__init__()
        self.patch, self.norm, self.head = nn.Linear(PATCH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)
        self.blocks = nn.Sequential(*(Block(attention) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patch(x))))


class MLP(nn.Module):
    """(B, TOKENS, PATCH) -> same."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(PATCH, 64), nn.GELU(), nn.Linear(64, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def build(kind, *args) -> nn.Module:
    """``kind(*args)`` in eval mode with seeded weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(*args).eval()


def patches(count: int = 4, batch: int = 2, shape: tuple[int, ...] = (TOKENS, PATCH)) -> list[Tensor]:
    """Seeded calibration items."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, *shape, generator=generator) for _ in range(count)]


def by_name(family: str, bits: int = 4, w_bits: int | None = None) -> dict:
    """``extra_qconfig_dict`` of ``BackendType.Academic`` with our quantizers."""
    scheme = dict(symmetry=False, pot_scale=False)
    return {
        "w_observer": "AHCQWeightObserver",
        "a_observer": f"{family}Observer",
        "w_fakequantize": "AHCQWeightFakeQuantize",
        "a_fakequantize": f"{family}FakeQuantize",
        "w_qscheme": dict(scheme, bit=w_bits or bits, per_channel=True),
        "a_qscheme": dict(scheme, bit=bits, per_channel=False),
    }


def ptq_config(**changes) -> argparse.Namespace:
    """Settings of MQBench's ``ptq_reconstruction``; it asks ``key in config`` as well as ``config.key``."""
    settings = dict(pattern="block", scale_lr=4e-4, warm_up=0.2, weight=0.01, max_count=200, b_range=[20, 2])
    settings |= dict(keep_gpu=True, round_mode="learned_hard_sigmoid", prob=0.5)
    return argparse.Namespace(**(settings | changes))


@torch.no_grad()
def relative_error(model: nn.Module, reference: nn.Module, data: list[Tensor]) -> float:
    """||model - reference|| / ||reference|| over all items."""
    wanted = torch.cat([reference(x) for x in data])
    return float((torch.cat([model(x) for x in data]) - wanted).norm() / wanted.norm())


def clone(model: nn.Module) -> nn.Module:
    """A copy; MQBench's prepared modules share their parameters with the model they came from."""
    return copy.deepcopy(model)
