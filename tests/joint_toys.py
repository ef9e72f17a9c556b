"""Blocks whose attention joins text and image, written by hand in the ways that are in use.

Each is called with image tokens, text tokens and an embedding, and hands out the first two, changed.

Letters: B batch, N image tokens, L text tokens, D width, H heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Streams = tuple[Tensor, Tensor]
"""Image [B, N, D] and text [B, L, D]."""


def heads_of(x_BND: Tensor, heads: int) -> Tensor:
    """[B, H, N, d]."""
    return x_BND.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(image: Tensor, text: Tensor, text_first: bool, dim: int) -> Tensor:
    """One sequence of both."""
    return torch.cat([text, image] if text_first else [image, text], dim=dim)


def part(joined: Tensor, text: int, text_first: bool) -> Streams:
    """Image and text of a sequence [B, N + L, D] with so many text tokens."""
    image = joined.shape[1] - text
    first, second = joined.split([text, image] if text_first else [image, text], dim=1)
    return (second, first) if text_first else (first, second)


class TwoSources(nn.Module):
    """Attention joined after projections of each source's own, with an output projection for each."""

    def __init__(self, width: int, heads: int, *, text_first: bool) -> None:
        super().__init__()
        self.heads, self.text_first = heads, text_first
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.add_q, self.add_k, self.add_v, self.to_add_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, image: Tensor, text: Tensor) -> Streams:
        pairs = ((self.to_q, self.add_q), (self.to_k, self.add_k), (self.to_v, self.add_v))
        q, k, v = (
            join(heads_of(to(image), self.heads), heads_of(add(text), self.heads), self.text_first, dim=2)
            for to, add in pairs
        )
        y_BHNd = F.scaled_dot_product_attention(q, k, v)
        image, text = part(y_BHNd.transpose(1, 2).flatten(2), text.shape[1], self.text_first)
        return self.to_out(image), self.to_add_out(text)


class OneSource(nn.Module):
    """Attention over a sequence that is joined already, with its output projection or without."""

    def __init__(self, width: int, heads: int, *, out: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width) if out else None

    def forward(self, x_BND: Tensor) -> Tensor:
        q, k, v = (heads_of(to(x_BND), self.heads) for to in (self.to_q, self.to_k, self.to_v))
        y_BND = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return y_BND if self.to_out is None else self.to_out(y_BND)


class JointBlock(nn.Module):
    """Two streams, gated each by the embedding; after their attention each has its MLP.

    Args:
        width: D.
        heads: H.
        text_first: where the text stands in the sequence.
        joined: after the "projections", or before them: one "source".
    """

    def __init__(self, width: int, heads: int, *, text_first: bool, joined: str) -> None:
        super().__init__()
        self.text_first, self.joined = text_first, joined
        self.modulation = nn.Linear(width, 6 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        one = joined == "source"
        self.attn = OneSource(width, heads, out=True) if one else TwoSources(width, heads, text_first=text_first)
        self.mlp, self.text_mlp = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(2)
        )

    def forward(self, image: Tensor, text: Tensor, embedding_BD: Tensor) -> Streams:
        chunks = self.modulation(F.silu(embedding_BD))[:, None].chunk(6, dim=-1)
        shift, scale, gate, text_shift, text_scale, text_gate = chunks
        image_in = self.norm(image) * (1 + scale) + shift
        text_in = self.norm(text) * (1 + text_scale) + text_shift
        if self.joined == "source":
            joined = self.attn(join(image_in, text_in, self.text_first, dim=1))
            image_out, text_out = part(joined, text.shape[1], self.text_first)
        else:
            image_out, text_out = self.attn(image_in, text_in)
        image, text = image + gate * image_out, text + text_gate * text_out
        return image + self.mlp(image), text + self.text_mlp(text)


class SingleBlock(nn.Module):
    """One stream; attention and MLP side by side share the output projection, and it is gated.

    Args:
        width: D.
        heads: H.
        text_first: where the text stands in the sequence.
        inline: queries, keys, values and MLP come of one projection in the block itself, which also calls SDPA.
    """

    def __init__(self, width: int, heads: int, *, text_first: bool, inline: bool) -> None:
        super().__init__()
        self.heads, self.text_first, self.inline = heads, text_first, inline
        self.modulation = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        if inline:
            self.linear1 = nn.Linear(width, 5 * width)
        else:
            self.attn = OneSource(width, heads, out=False)
            self.proj_mlp = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(3 * width, width)

    def forward(self, image: Tensor, text: Tensor, embedding_BD: Tensor) -> Streams:
        shift, scale, gate = self.modulation(F.silu(embedding_BD))[:, None].chunk(3, dim=-1)
        x_BND = join(image, text, self.text_first, dim=1)
        h_BND = self.norm(x_BND) * (1 + scale) + shift
        if self.inline:
            width = x_BND.shape[-1]
            qkv, mlp = self.linear1(h_BND).split([3 * width, 2 * width], dim=-1)
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            attn = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        else:
            mlp, attn = self.proj_mlp(h_BND), self.attn(h_BND)
        x_BND = x_BND + gate * self.proj_out(torch.cat((attn, F.gelu(mlp)), dim=-1))
        return part(x_BND, text.shape[1], self.text_first)
