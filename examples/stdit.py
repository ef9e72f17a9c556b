"""STDiT of Open-Sora 1.0 to 1.1, cut small and without its libraries: einops, timm, xformers.

Its blocks have two self-attentions, over space and over time, which fold the other axis into the batch, and
a cross-attention that lays the whole batch out as one sequence.

Letters: B batch, T frames, S tokens of a frame, N = T * S, L caption tokens, D width, H heads, d head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention [B, N, D] -> [B, N, D] with one projection for q, k and v.

    Args:
        width: D.
        heads: H.
        qk_norm: RMSNorm on q and k.
        rope: q and k are turned by their position, after the norms.
        fused: SDPA instead of the explicit product, whose softmax is computed in float32.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, rope: bool, fused: bool) -> None:
        super().__init__()
        self.heads, self.depth, self.fused, self.rope = heads, width // heads, fused, rope
        self.scale = self.depth**-0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(self.depth, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.depth, eps=1e-6) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Attend, [B, N, D]."""
        batch, tokens, width = x_BND.shape
        qkv = self.qkv(x_BND).view(batch, tokens, 3, self.heads, self.depth).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = rotate(q), rotate(k)
        if self.fused:
            y_BHNd = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p, scale=self.scale)
        else:
            dtype = q.dtype
            q = q * self.scale
            attn = q @ k.transpose(-2, -1)
            attn = attn.to(torch.float32)
            attn = attn.softmax(dim=-1)
            attn = attn.to(dtype)
            attn = self.attn_drop(attn)
            y_BHNd = attn @ v
        y_BND = y_BHNd.transpose(1, 2).reshape(batch, tokens, width)
        return self.proj_drop(self.proj(y_BND))


def rotate(q_BHNd: Tensor) -> Tensor:
    """Turns neighbouring pairs of channels by position, as rotary-embedding-torch does."""
    tokens, depth = q_BHNd.shape[-2:]
    rates = 1.0 / 10000 ** (torch.arange(0, depth, 2, device=q_BHNd.device) / depth)
    angles = torch.outer(torch.arange(tokens, device=q_BHNd.device).float(), rates).repeat_interleave(2, dim=-1)
    first, second = q_BHNd.unflatten(-1, (depth // 2, 2)).unbind(-1)
    turned = torch.stack((-second, first), dim=-1).flatten(-2)
    return q_BHNd * angles.cos() + turned * angles.sin()


class CrossAttention(nn.Module):
    """Attention to captions: [B, N, D], packed captions [1, sum of lengths, D] -> [B, N, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.depth = heads, width // heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, y_1LD: Tensor, lengths: list[int]) -> Tensor:
        """Attend to the captions, of which each sample has its own ``lengths`` of the L tokens."""
        batch, tokens, width = x_BND.shape
        q = self.q_linear(x_BND).view(1, -1, self.num_heads, self.depth)
        k, v = self.kv_linear(y_1LD).view(1, -1, 2, self.num_heads, self.depth).unbind(2)
        mask = block_diagonal(x_BND, [tokens] * batch, lengths)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y_1HNd = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(y_1HNd.transpose(1, 2).reshape(batch, -1, width))


def block_diagonal(like: Tensor, queries: list[int], keys: list[int]) -> Tensor:
    """Additive mask that lets each sample's queries see its own keys alone."""
    mask = torch.empty(sum(queries), sum(keys), dtype=like.dtype, device=like.device)
    mask.fill_(-math.inf)
    row = column = 0
    for rows, columns in zip(queries, keys, strict=True):
        mask[row : row + rows, column : column + columns] = 0
        row, column = row + rows, column + columns
    return mask


class STDiTBlock(nn.Module):
    """Spatial, temporal and cross-attention, then an MLP; one gate for the first two."""

    def __init__(
        self, width: int, heads: int, frames: int, spots: int, *, qk_norm: bool, rope: bool, fused: bool
    ) -> None:
        super().__init__()
        self.frames, self.spots = frames, spots
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads, qk_norm=qk_norm, rope=False, fused=fused)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn_temp = Attention(width, heads, qk_norm=qk_norm, rope=rope, fused=fused)

    def forward(
        self, x_BND: Tensor, y_1LD: Tensor, time_B6D: Tensor, lengths: list[int], position_1TD: Tensor | None
    ) -> Tensor:
        """The block, [B, N, D]; ``position_1TD`` is added before the temporal attention."""
        batch, _, width = x_BND.shape
        frames, spots = self.frames, self.spots
        table = self.scale_shift_table[None] + time_B6D.reshape(batch, 6, -1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)
        x_m = self.norm1(x_BND) * (1 + scale_msa) + shift_msa

        x_s = x_m.reshape(batch * frames, spots, width)
        x_s = self.attn(x_s).reshape(batch, frames * spots, width)
        x_BND = x_BND + gate_msa * x_s

        x_t = x_BND.reshape(batch, frames, spots, width).transpose(1, 2).reshape(batch * spots, frames, width)
        if position_1TD is not None:
            x_t = x_t + position_1TD
        x_t = self.attn_temp(x_t).reshape(batch, spots, frames, width)
        x_t = x_t.transpose(1, 2).reshape(batch, frames * spots, width)
        x_BND = x_BND + gate_msa * x_t

        x_BND = x_BND + self.cross_attn(x_BND, y_1LD, lengths)
        return x_BND + gate_mlp * self.mlp(self.norm2(x_BND) * (1 + scale_mlp) + shift_mlp)


class FinalLayer(nn.Module):
    """Modulation by a table and the timestep, then the projection to patches."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x_BND: Tensor, time_BD: Tensor) -> Tensor:
        """Tokens to patches, [B, N, 4 C]."""
        shift, scale = (self.scale_shift_table[None] + time_BD[:, None]).chunk(2, dim=1)
        return self.linear(self.norm_final(x_BND) * (1 + scale) + shift)


class STDiT(nn.Module):
    """The denoiser: latents [B, C, T, H, W], timestep [B], captions [B, 1, L, D] and their mask [B or B / 2, L].

    With a mask the lengths are read from it, which breaks Dynamo's graph before the blocks.
    """

    def __init__(
        self,
        *,
        layers: int,
        width: int,
        heads: int,
        frames: int,
        side: int,
        channels: int,
        caption_channels: int,
        qk_norm: bool,
        rope: bool,
        fused: bool,
    ) -> None:
        super().__init__()
        spots = (side // 2) ** 2
        self.frames, self.rows, self.channels = frames, side // 2, 2 * channels
        self.x_embedder = nn.Conv3d(channels, width, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.register_buffer("pos_embed", 0.5 * torch.randn(1, spots, width))
        self.register_buffer("pos_embed_temporal", 0.5 * torch.randn(1, frames, width))
        self.t_embedder = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = nn.Sequential(nn.Linear(caption_channels, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            STDiTBlock(width, heads, frames, spots, qk_norm=qk_norm, rope=rope, fused=fused) for _ in range(layers)
        )
        self.final_layer = FinalLayer(width, 4 * self.channels)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """The prediction, [B, 2 C, T, H, W] in float32."""
        batch, width = x.shape[0], self.pos_embed.shape[-1]
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        x = x.reshape(batch, self.frames, -1, width) + self.pos_embed
        x = x.reshape(batch, -1, width)
        rates = torch.exp(-math.log(10000) * torch.arange(16, device=x.device) / 16)
        angles = timestep[:, None].float() * rates
        t = self.t_embedder(torch.cat([angles.cos(), angles.sin()], dim=-1))
        t0 = self.t_block(t)
        y = self.y_embedder(y)
        if mask is None:
            lengths = [y.shape[2]] * batch
            y = y.squeeze(1).view(1, -1, width)
        else:
            mask = mask.repeat(batch // mask.shape[0], 1)
            y = y.squeeze(1).masked_select(mask.unsqueeze(-1) != 0).view(1, -1, width)
            lengths = mask.sum(dim=1).tolist()
        for index, block in enumerate(self.blocks):
            x = block(x, y, t0, lengths, self.pos_embed_temporal if index == 0 else None)
        return self.unpatchify(self.final_layer(x, t)).to(torch.float32)

    def unpatchify(self, x_BNC: Tensor) -> Tensor:
        """Tokens to [B, C, T, H, W]."""
        batch, frames, rows, channels = x_BNC.shape[0], self.frames, self.rows, self.channels
        x = x_BNC.reshape(batch, frames, rows, rows, 2, 2, channels).permute(0, 6, 1, 2, 4, 3, 5)
        return x.reshape(batch, channels, frames, 2 * rows, 2 * rows)
