# SPDX-License-Identifier: Apache-2.0
"""Small models written as the families of docs/models.md are: what makes each hard to trace, and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DIM, HEADS = 16, 2


def heads(x: Tensor) -> Tensor:
    """(B, n, C) -> (B, heads, n, C / heads)."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))


class Attention(nn.Module):
    """q, k, v of tokens (B, n, C); subclasses change what happens to them."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor | None = None, rotate=lambda x: x) -> Tensor:
        memory = x if memory is None else memory
        q, k, v = rotate(heads(self.q(x))), rotate(heads(self.k(memory))), heads(self.v(memory))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attention: type[nn.Module] = Attention):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(DIM), attention(), nn.LayerNorm(DIM), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Patches of an image (B, 3, 32, 32) through blocks; ``call`` says how a family calls a block."""

    def __init__(self, block: type[nn.Module] = Block):
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, 8, 8)
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, image: Tensor):
        x = self.embed(image).flatten(2).transpose(1, 2)
        for index, block in enumerate(self.blocks):
            x = self.call(block, x, index)
        return x

    def call(self, block: nn.Module, x: Tensor, index: int) -> Tensor:
        return block(x)


class WindowedBlock(Block):
    def __init__(self):
        super().__init__()
        self.window_size = 0


class HqSam(Model):
    """Outer code reads plain attributes of the blocks."""

    def __init__(self):
        super().__init__(WindowedBlock)
        self.blocks[1].window_size = 2

    def call(self, block, x, index):
        x = block(x)
        return x + 0.1 if block.window_size == 0 else x


class OptionalArgumentBlock(Block):
    def forward(self, x, rope=None, pos=None, layer_idx=None):
        """``rope``: (n, 2 · C / heads) sines and cosines; ``pos`` (n, C); ``layer_idx`` is passed on and not used."""
        if pos is not None:
            x = x + pos

        def rotate(q):
            if rope is None:
                return q
            sine, cosine = rope.chunk(2, -1)
            turned = torch.stack([-q[..., 1::2], q[..., ::2]], -1).reshape(q.shape)
            return q * cosine + turned * sine

        x = x + self.attn(self.norm1(x), rotate=rotate)
        return x + self.mlp(self.norm2(x))


class DinoV3(Model):
    """A table of rotary positions is an argument with a default (EVA-02 too)."""

    def __init__(self):
        super().__init__(OptionalArgumentBlock)
        self.register_buffer("rope", torch.linspace(-1, 1, 16 * DIM).view(16, DIM), persistent=False)

    def call(self, block, x, index):
        return block(x, rope=self.rope)


class EdgeTam(Model):
    """Positions are an argument with a default."""

    def __init__(self):
        super().__init__(OptionalArgumentBlock)
        self.pos = nn.Parameter(torch.linspace(-1, 1, 16 * DIM).view(16, DIM))

    def call(self, block, x, index):
        return block(x, pos=self.pos)


class EdgeSamDecoder(Model):
    """Every layer is told its number."""

    def __init__(self):
        super().__init__(OptionalArgumentBlock)

    def call(self, block, x, index):
        return block(x, layer_idx=index)


class RankAttention(nn.Module):
    """SAM 3's: asks for the rank, iterates over sizes, turns with a table of complex numbers."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        angle = torch.outer(torch.arange(16.0), torch.arange(1.0, 1 + DIM // HEADS // 2))
        self.register_buffer("turns", torch.polar(torch.ones_like(angle), angle / 10), persistent=False)

    def turn(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        assert self.turns.shape == (pairs.shape[-2], pairs.shape[-1])
        shape = [size if i >= pairs.ndim - 2 else 1 for i, size in enumerate(pairs.shape)]
        return torch.view_as_real(pairs * self.turns.view(*shape)).flatten(3).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            batch, height, width, _ = x.shape
            count = height * width
        else:
            assert x.ndim == 3
            batch, count, _ = x.shape
            height = width = math.sqrt(count)
        qkv = self.qkv(x).reshape(batch, count, 3, HEADS, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v)
        return self.proj(
            out.view(batch, HEADS, height, width, -1).permute(0, 2, 3, 1, 4).reshape(batch, height, width, -1)
        )


class Sam3(Model):
    def __init__(self):
        super().__init__(lambda: Block(RankAttention))

    def call(self, block, x, index):
        return block(x.unflatten(1, (4, 4))).flatten(1, 2)


class QuietAttention(nn.MultiheadAttention):
    """SAM 3's wrapper: nn.MultiheadAttention with an argument fixed."""

    def forward(self, *args, **kwargs):
        kwargs["need_weights"] = False
        return super().forward(*args, **kwargs)


class KeywordLayer(nn.Module):
    """SAM 3's encoder layer: keywords only, masks that are None, autocast inside, None among the outputs."""

    def __init__(self):
        super().__init__()
        self.self_attn = QuietAttention(DIM, HEADS, batch_first=True)
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(DIM), nn.LayerNorm(DIM), Mlp()

    def forward(self, tgt: Tensor, query_pos: Tensor | None = None, tgt_mask: Tensor | None = None, **kwargs):
        q = tgt if query_pos is None else tgt + query_pos
        tgt = self.norm1(tgt + self.self_attn(q, q, value=tgt, attn_mask=tgt_mask)[0])
        with torch.amp.autocast(device_type="cuda", enabled=False):
            tgt = self.norm2(tgt + self.mlp(tgt))
        return tgt, None


class Sam3Encoder(Model):
    def __init__(self):
        super().__init__(KeywordLayer)
        self.pos = nn.Parameter(torch.linspace(-1, 1, 16 * DIM).view(16, DIM))

    def call(self, block, x, index):
        return block(tgt=x, query_pos=self.pos, tgt_mask=None, memory_mask=None)[0]


def sdpa_interface(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """As ``transformers`` calls attention; ``attention_mask``: added to the scores."""
    is_causal = query.shape[2] > 1 and attention_mask is None and is_causal
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, is_causal=is_causal
    )
    return out.transpose(1, 2).contiguous(), None


INTERFACES = {"sdpa": sdpa_interface}


class InterfaceAttention(nn.Module):
    """Attention is looked up by name; rotary positions come as a tuple; relative ones ask for sizes."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.kind = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), "sdpa"
        self.rel_pos = nn.Parameter(torch.linspace(-1, 1, 31 * DIM // HEADS).view(31, -1))

    def relative(self, count: int) -> Tensor:
        longest = int(2 * max(count, count) - 1)
        table = self.rel_pos
        if table.shape[0] != longest:
            table = F.interpolate(table.t()[None], size=longest, mode="linear")[0].t()
        place = torch.arange(count)[:, None] * max(count / count, 1.0) - torch.arange(count)[None, :] + (count - 1)
        return table[place.long()]

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs):
        shape = hidden_states.shape[:-1]
        query, key, value = (heads(x) for x in self.qkv(hidden_states).chunk(3, -1))
        cosine, sine = position_embeddings
        query, key = (x * cosine + x.roll(1, -1) * sine for x in (query, key))
        mask = torch.einsum("bhqc,qkc->bhqk", query, self.relative(hidden_states.shape[1]))
        interface = INTERFACES.get(self.kind)
        out, weights = interface(self, query, key, value, mask, scaling=0.25, is_causal=False, **kwargs)
        return self.proj(out.reshape(*shape, -1).contiguous()), weights


class InterfaceLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(DIM), InterfaceAttention()
        self.norm2, self.mlp = nn.LayerNorm(DIM), Mlp()

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        residual = hidden_states
        hidden_states, _ = self.attn(hidden_states=self.norm1(hidden_states), **kwargs)
        hidden_states = residual + hidden_states
        return hidden_states + self.mlp(self.norm2(hidden_states))


@dataclass
class Output:
    last_hidden_state: Tensor
    shape: tuple[int, ...]
    attentions: Tensor | None = None


class HuggingFace(Model):
    """Keyword arguments are handed down, the output is a dataclass."""

    def __init__(self):
        super().__init__(InterfaceLayer)
        self.register_buffer("angles", torch.linspace(-1, 1, 16 * DIM // HEADS).view(16, -1), persistent=False)

    def forward(self, image):
        x = super().forward(image)
        return Output(x, tuple(x.shape))

    def call(self, block, x, index):
        return block(x, position_embeddings=(self.angles.cos(), self.angles.sin()))


class SizesBlock(Block):
    """MViT's: sizes come in and go out as integers; TinyViT's: a question of sizes."""

    def forward(self, x, feat_size: tuple[int, int]):
        height, width = feat_size
        if height == 4 and width == 4:
            x = x + self.attn(self.norm1(x))
        ratio = max(height / width, 1.0)
        return x + ratio * self.mlp(self.norm2(x)), [height, width]


class Sizes(Model):
    def __init__(self):
        super().__init__(SizesBlock)

    def call(self, block, x, index):
        x, size = block(x, (4, 4))
        assert size == [4, 4] and type(size[0]) is int
        return x


class ConvBn(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, groups: int = 1):
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
        )


class MBConv(nn.Module):
    """Expand, depthwise, project: MobileSAM, TinySAM, EdgeSAM."""

    def __init__(self):
        super().__init__()
        self.expand, self.depthwise, self.project = ConvBn(DIM, 32), ConvBn(32, 32, 3, 32), ConvBn(32, DIM)
        self.act = nn.GELU()

    def forward(self, x):
        return self.act(x + self.project(self.act(self.depthwise(self.act(self.expand(x))))))


class Stage(nn.Module):
    def __init__(self, block: type[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList([block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class LayerNorm2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x):
        return x / torch.sqrt((x * x).mean(1, keepdim=True) + 1e-6) * self.weight[:, None, None]


class MobileSam(nn.Module):
    """Stages of convolutions and of attention; the neck is beside the stages, not beside the blocks."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, 8, 8)
        self.layers = nn.ModuleList([Stage(MBConv), Stage(Block)])
        self.neck = nn.Sequential(
            nn.Conv2d(DIM, DIM, 1, bias=False),
            LayerNorm2d(),
            nn.Conv2d(DIM, DIM, 3, padding=1, bias=False),
            LayerNorm2d(),
        )

    def forward(self, image):
        x = self.layers[0](self.embed(image)).flatten(2).transpose(1, 2)
        return self.neck(self.layers[1](x).transpose(1, 2).unflatten(2, (4, 4)))


class GrnBlock(nn.Module):
    """ConvNeXt V2's: a norm over places between the activation and the second layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM), nn.LayerNorm(DIM)
        self.fc1, self.act, self.fc2 = nn.Linear(DIM, 32), nn.GELU(), nn.Linear(32, DIM)
        self.gain = nn.Parameter(torch.full((32,), 0.5))

    def forward(self, x):
        inner = self.act(self.fc1(self.norm(self.conv(x).permute(0, 2, 3, 1))))
        size = inner.norm(dim=(1, 2), keepdim=True)
        inner = inner + self.gain * inner * size / (size.mean(-1, keepdim=True) + 1e-6)
        return x + self.fc2(inner).permute(0, 3, 1, 2)


class ConvNextV2(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Conv2d(3, DIM, 8, 8), nn.ModuleList(GrnBlock() for _ in range(2))

    def forward(self, image):
        x = self.embed(image)
        for block in self.blocks:
            x = block(x)
        return x
