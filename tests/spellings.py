"""Self-attention as others write it, [B, N, D] -> [B, N, D]: one class for each kind of code one meets.

Each is made by ``kind(width, heads, tokens, **options)``.

Letters: B batch, N tokens, D width, H heads, G groups of heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimmAttention(nn.Module):
    """timm's attention, as in the original DiT, with the product in many spellings.

    Args:
        width: D.
        heads: H.
        tokens: N.
        product: "sdpa"; "matmul" and "einsum" on [B, H, N, d]; "bmm", "baddbmm" and "einsum_folded" on [B * H, N, d].
        scale: an explicit product's scale: on the "query" before, on the "scores" after, or "divide" after.
        softmax: "method", "function" or "module".
        dropout: a dropout of 0 on the probabilities.
        bias: a learned bias [H, N, N] on the scores.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        tokens: int,
        *,
        product: str = "sdpa",
        scale: str = "query",
        softmax: str = "method",
        dropout: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.depth = heads, width // heads
        self.product, self.scaled, self.softmax = product, scale, softmax
        self.scale = self.depth**-0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.attn_drop = nn.Dropout(0.0) if dropout else None
        self.soft = nn.Softmax(dim=-1)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.0)
        self.bias = nn.Parameter(torch.randn(heads, tokens, tokens)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, self.depth).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.product == "sdpa":
            y_BHNd = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        elif self.product in ("matmul", "einsum"):
            y_BHNd = self.explicit(q, k, v)
        else:
            q, k, v = (part.reshape(B * self.heads, N, self.depth) for part in (q, k, v))
            y_BHNd = self.folded(q, k, v).reshape(B, self.heads, N, self.depth)
        x = y_BHNd.transpose(1, 2).reshape(B, N, D)
        return self.proj_drop(self.proj(x))

    def explicit(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Two products with heads on an axis of their own."""
        if self.scaled == "query":
            q = q * self.scale
        named = self.product == "einsum"
        attn = torch.einsum("bhid,bhjd->bhij", q, k) if named else q @ k.transpose(-2, -1)
        attn = self.rescale(attn)
        if self.bias is not None:
            attn = attn + self.bias
        attn = self.normalise(attn)
        return torch.einsum("bhij,bhjd->bhid", attn, v) if named else attn @ v

    def folded(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Two products with heads folded into the batch."""
        batch = q.shape[0] // self.heads
        bias = None if self.bias is None else self.bias.repeat(batch, 1, 1)
        if self.product == "baddbmm":
            unused = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
            attn = torch.baddbmm(
                unused if bias is None else bias,
                q,
                k.transpose(-1, -2),
                beta=0 if bias is None else 1,
                alpha=self.scale,
            )
            return torch.bmm(self.normalise(attn).to(q.dtype), v)
        if self.scaled == "query":
            q = q * self.scale
        if self.product == "einsum_folded":
            attn = torch.einsum("b i d, b j d -> b i j", q, k)
        else:
            attn = torch.bmm(q, k.transpose(1, 2))
        attn = self.rescale(attn)
        if bias is not None:
            attn = attn + bias
        attn = self.normalise(attn)
        return torch.einsum("b i j, b j d -> b i d", attn, v) if self.product == "einsum_folded" else torch.bmm(attn, v)

    def rescale(self, attn: Tensor) -> Tensor:
        """Scores with their scale, where the queries did not have it."""
        if self.scaled == "divide":
            return attn / self.depth**0.5
        return attn * self.scale if self.scaled == "scores" else attn

    def normalise(self, attn: Tensor) -> Tensor:
        """Probabilities."""
        if self.softmax == "method":
            attn = attn.softmax(dim=-1)
        else:
            attn = F.softmax(attn, dim=-1) if self.softmax == "function" else self.soft(attn)
        return attn if self.attn_drop is None else self.attn_drop(attn)


class TorchAttention(nn.Module):
    """nn.MultiheadAttention, in ``mha``.

    Args:
        width: D.
        heads: H.
        tokens: N, unused.
        need_weights: it also hands out probabilities, and so has to compute them.
        batch_first: else it is called with [N, B, D].
    """

    def __init__(
        self, width: int, heads: int, tokens: int, *, need_weights: bool = False, batch_first: bool = True
    ) -> None:
        super().__init__()
        self.need_weights, self.batch_first = need_weights, batch_first
        self.mha = nn.MultiheadAttention(width, heads, batch_first=batch_first)

    def forward(self, x_BND: Tensor) -> Tensor:
        x = x_BND if self.batch_first else x_BND.transpose(0, 1)
        y, _ = self.mha(x, x, x, need_weights=self.need_weights)
        return y if self.batch_first else y.transpose(0, 1)


class GroupedAttention(nn.Module):
    """Keys and values have half as many heads as queries.

    Args:
        width: D.
        heads: H, of queries.
        tokens: N, unused.
        sharing: heads of keys meet those of queries by "repeat_interleave", by "expand" or in SDPA, by "enable_gqa".
    """

    def __init__(self, width: int, heads: int, tokens: int, *, sharing: str) -> None:
        super().__init__()
        self.heads, self.depth, self.sharing = heads, width // heads, sharing
        self.to_q, self.to_out = nn.Linear(width, width), nn.Linear(width, width)
        self.to_k, self.to_v = nn.Linear(width, width // 2), nn.Linear(width, width // 2)

    def forward(self, x_BND: Tensor) -> Tensor:
        q, k, v = (
            to(x_BND).unflatten(-1, (-1, self.depth)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v)
        )
        if self.sharing == "enable_gqa":
            y_BHNd = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            y_BHNd = F.scaled_dot_product_attention(q, self.spread(k), self.spread(v))
        return self.to_out(y_BHNd.transpose(1, 2).flatten(2))

    def spread(self, k_BGNd: Tensor) -> Tensor:
        """Each head twice in sequence: [B, H, N, d]."""
        if self.sharing == "repeat_interleave":
            return k_BGNd.repeat_interleave(2, dim=1)
        batch, groups, tokens, depth = k_BGNd.shape
        return k_BGNd[:, :, None].expand(batch, groups, 2, tokens, depth).reshape(batch, -1, tokens, depth)


class CompressedAttention(nn.Module):
    """Keys and values of one token for every 2 x 2, by a strided convolution, as in PixArt-Sigma's own code."""

    def __init__(self, width: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.heads, self.side = heads, round(tokens**0.5)
        self.qkv = nn.Linear(width, 3 * width)
        self.sr = nn.Conv2d(width, width, groups=width, kernel_size=2, stride=2)
        nn.init.constant_(self.sr.weight, 1 / 4)
        nn.init.zeros_(self.sr.bias)
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, D).unbind(2)
        k, v = self.shorten(k), self.shorten(v)
        q, k, v = (part.reshape(B, -1, self.heads, D // self.heads).transpose(1, 2) for part in (q, k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))

    def shorten(self, k_BND: Tensor) -> Tensor:
        """[B, N / 4, D]."""
        B, _, D = k_BND.shape
        k_BDHW = k_BND.reshape(B, self.side, self.side, D).permute(0, 3, 1, 2)
        return self.norm(self.sr(k_BDHW).reshape(B, D, -1).permute(0, 2, 1)).contiguous()


class MaskedAttention(nn.Module):
    """Tokens see those at most ``reach`` apart.

    Args:
        width: D.
        heads: H.
        tokens: N.
        masking: scores are overwritten by "fill", "where", "where_tensor" or "fill_inf"; or "sdpa" has a mask.
        reach: how far.
    """

    def __init__(self, width: int, heads: int, tokens: int, *, masking: str, reach: int = 40) -> None:
        super().__init__()
        self.heads, self.masking = heads, masking
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        place = torch.arange(tokens)
        self.register_buffer("near", (place[:, None] - place).abs() <= reach)

    def forward(self, x_BND: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x_BND).chunk(3, -1))
        if self.masking == "sdpa":
            y_BHNd = F.scaled_dot_product_attention(q, k, v, attn_mask=self.near)
        else:
            y_BHNd = self.masked(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.proj(y_BHNd.transpose(1, 2).flatten(2))

    def masked(self, scores: Tensor) -> Tensor:
        """Scores that are overwritten where tokens are far."""
        lowest = torch.finfo(scores.dtype).min
        if self.masking == "fill":
            return scores.masked_fill(~self.near, lowest)
        if self.masking == "fill_inf":
            return scores.masked_fill_(self.near.logical_not()[None, None], float("-inf"))
        other = torch.tensor(lowest) if self.masking == "where_tensor" else lowest
        return torch.where(self.near, scores, other)


class ChannelsFirstAttention(nn.Module):
    """Attention of convolution nets, on [B, D, N]: ADM's, flow_matching's, LDM's.

    Args:
        width: D.
        heads: H.
        tokens: N, unused.
        product: "einsum" or "bmm" with values on the left; "function" is the first in a ``torch.autograd.Function``; or
            "sdpa" to compare with.
        padding: of the projections, convolutions of size 1.
    """

    def __init__(self, width: int, heads: int, tokens: int, *, product: str, padding: int | str = 0) -> None:
        super().__init__()
        self.heads, self.product = heads, product
        self.norm = nn.GroupNorm(4, width)
        self.qkv, self.out = (
            nn.Conv1d(width, 3 * width, 1, padding=padding),
            nn.Conv1d(width, width, 1, padding=padding),
        )

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BDN = x_BND.transpose(1, 2)
        if self.product == "function":
            y_BDN = _Recomputed.apply(self.block, x_BDN, *self.parameters())
        else:
            y_BDN = self.block(x_BDN)
        return y_BDN.transpose(1, 2)

    def block(self, x_BDN: Tensor) -> Tensor:
        """Norm, projections, attention."""
        batch, width, tokens = x_BDN.shape
        depth = width // self.heads
        q, k, v = self.qkv(self.norm(x_BDN)).reshape(batch * self.heads, 3 * depth, tokens).split(depth, 1)
        return self.out(self.attend(q, k, v).reshape(batch, width, tokens))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B H, d, N] each."""
        if self.product == "sdpa":
            q, k, v = (t.unflatten(0, (-1, self.heads)).transpose(2, 3) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(0, 1)
        scale = q.shape[1] ** -0.5
        if self.product == "bmm":
            weights = torch.softmax(torch.bmm(q.permute(0, 2, 1), k) * scale, dim=2)
            return torch.bmm(v, weights.permute(0, 2, 1))
        weights = torch.einsum("bct,bcs->bts", q * scale**0.5, k * scale**0.5).float().softmax(-1)
        return torch.einsum("bts,bcs->bct", weights, v)


class _Recomputed(torch.autograd.Function):
    """Runs a block that is run again for its gradients."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError
