"""Denoisers written by hand in plain torch, each option one trap for a rewrite of attention.

Letters: B batch, N tokens, D width, C channels, H heads, d head width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ToyAttention(nn.Module):
    """Self-attention [B, N, D] -> [B, N, D]: projections, SDPA, ``to_out`` and a dropout of 0.

    Args:
        fused: one linear for q, k and v, so that the batch stands at dim 1 for a moment.
        qk_norm: RMSNorm on q and k.
        rotary: tables [N, d] turn q and k: "rotate", or "inplace" with writes into slices.
        table: rows of a parameter [rows, D] that shifts the input, for a batch of as many.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        tokens: int,
        *,
        fused: bool = False,
        qk_norm: bool = False,
        rotary: str | None = None,
        table: int = 0,
    ) -> None:
        super().__init__()
        self.heads, self.fused, self.rotary = heads, fused, rotary
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        depth = width // heads
        self.norm_q = nn.RMSNorm(depth) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(depth) if qk_norm else nn.Identity()
        self.table = nn.Parameter(torch.randn(table, width)) if table else None
        self.to_out = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.0)
        angles_Nd = torch.arange(tokens)[:, None] / 50 ** (torch.arange(depth // 2) * 2 / depth)
        self.register_buffer("cos", angles_Nd.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles_Nd.sin().repeat(1, 2), persistent=False)

    def forward(self, x_BND: Tensor, mask: Tensor | None = None) -> Tensor:
        """The attention's result, before any gate; ``mask`` as SDPA takes it."""
        batch, tokens, width = x_BND.shape
        if self.table is not None:
            x_BND = x_BND + self.table.sum(0)
        q, k, v = self.project(x_BND)
        q, k = self.turn(self.norm_q(q)), self.turn(self.norm_k(k))
        y_BHNd = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.dropout(self.to_out(y_BHNd.transpose(1, 2).reshape(batch, tokens, width)))

    def project(self, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each [B, H, N, d]."""
        batch, tokens, width = x_BND.shape
        depth = width // self.heads
        if self.fused:
            qkv = self.qkv(x_BND).reshape(batch, tokens, 3, self.heads, depth)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        q, k, v = (
            to(x_BND).view(batch, -1, self.heads, depth).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v)
        )
        return q, k, v

    def turn(self, q_BHNd: Tensor) -> Tensor:
        """Turns q or k by its position."""
        if self.rotary is None:
            return q_BHNd
        first, second = q_BHNd.chunk(2, dim=-1)
        if self.rotary == "rotate":
            return q_BHNd * self.cos + torch.cat([-second, first], dim=-1) * self.sin
        cos_Nd, sin_Nd = self.cos[:, : first.shape[-1]], self.sin[:, : first.shape[-1]]
        turned = torch.empty_like(q_BHNd)
        turned[..., 0::2] = first * cos_Nd - second * sin_Nd
        turned[..., 1::2] = first * sin_Nd + second * cos_Nd
        return turned


class ToyBlock(nn.Module):
    """The block x + gate(t, c) * attn(modulated x), then an MLP.

    ``frames`` parts of the sequence are folded into the batch for ``attn``.
    """

    def __init__(self, width: int, heads: int, tokens: int, *, frames: int, **options: Any) -> None:
        super().__init__()
        self.frames = frames
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width)
        self.modulation = nn.Linear(width, 3 * width)
        self.attn = ToyAttention(width, heads, tokens, **options)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_BND: Tensor, embedding_BD: Tensor, mask: Tensor | None) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(embedding_BD))[:, None].chunk(3, dim=-1)
        h_BND = self.norm1(x_BND) * (1 + scale) + shift
        batch, tokens, width = x_BND.shape
        if self.frames > 1:
            h_BND = h_BND.reshape(batch * self.frames, tokens // self.frames, width)
        y_BND = self.attn(h_BND, mask).reshape(batch, tokens, width)
        x_BND = x_BND + gate * y_BND
        return x_BND + self.mlp(self.norm2(x_BND))


class Toy(nn.Module):
    """A denoiser in plain torch: forward(x_BND or x_BCHW, timestep, condition, mask).

    Args:
        blocks: how many; they stand in a ModuleList.
        named: two blocks as attributes ``block_a`` and ``block_b`` instead.
        image: x is an image whose pixels are the tokens.
    """

    def __init__(
        self,
        *,
        blocks: int,
        width: int,
        heads: int,
        tokens: int,
        channels: int,
        classes: int,
        named: bool,
        image: bool,
        frames: int,
        **options: Any,
    ) -> None:
        super().__init__()
        self.image, self.named = image, named
        self.embed = nn.Linear(channels, width)
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.5)
        self.time = nn.Linear(16, width)
        self.label = nn.Embedding(classes + 1, width)
        make = functools.partial(ToyBlock, width, heads, tokens // frames, frames=frames, **options)
        if named:
            self.block_a, self.block_b = make(), make()
        else:
            self.blocks = nn.ModuleList(make() for _ in range(blocks))
        self.out = nn.Linear(width, channels)

    def forward(self, x: Tensor, timestep: Tensor, condition: Tensor, mask: Tensor | None = None) -> Tensor:
        x_BNC = x.flatten(2).transpose(1, 2) if self.image else x
        angles_B8 = timestep.reshape(-1, 1) / 1000 * 2.0 ** torch.arange(8, device=x.device)
        time_BD = self.time(torch.cat([angles_B8.sin(), angles_B8.cos()], dim=-1))
        embedding_BD = time_BD + self.label(condition)
        x_BND = self.embed(x_BNC) + self.position
        for block in (self.block_a, self.block_b) if self.named else self.blocks:
            x_BND = block(x_BND, embedding_BD, mask)
        y_BNC = self.out(x_BND)
        return y_BNC.transpose(1, 2).reshape(x.shape) if self.image else y_BNC
