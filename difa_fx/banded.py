"""Banded attention as operators of their own: a call of SDPA for each block of queries, on slices of the keys.

The slices are views and each block's result is written once, with the residual added or taken on the way, while it is
still in cache.  To a compiler each is one opaque operator, so that a band costs nothing to trace or to generate code
for.  They run on every device; on CPU they are the default.

Letters: B batch, H heads, N tokens, D head width, S block of queries, w window, L = S + 2 w keys of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_MIN_BLOCK: Final = 64
_MAX_BLOCKS: Final = 32

_library: Any = torch.library.Library("difa", "DEF")  # type: ignore[no-untyped-call]
_QKV = "Tensor q, Tensor k, Tensor v, Tensor? mask"
_BAND = "Tensor band, int window, float? scale"
_library.define(f"band_attention({_QKV}, Tensor? residual, {_BAND}) -> Tensor")
_library.define(f"band_residual(Tensor full, {_QKV}, {_BAND}) -> Tensor")

band_attention = torch.ops.difa.band_attention.default
"""Attention within the band, plus ``residual`` if there is one, [B, N, H, D]; q, k and v are [B, H, N, D]."""

band_residual = torch.ops.difa.band_residual.default
"""``full`` minus attention within the band, [B, N, H, D]."""


def band(tokens: int, window: int, like: Tensor) -> Tensor:
    """The additive band of one block, [S, L]: what both operators add to the scores."""
    rows = min(tokens, block_size(tokens, window))
    row = torch.arange(rows, device=like.device)[:, None]
    column = torch.arange(rows + 2 * window, device=like.device)[None] - window
    outside = torch.tensor(-math.inf, dtype=like.dtype, device=like.device)
    inside = torch.zeros((), dtype=like.dtype, device=like.device)
    return torch.where((row - column).abs() <= window, inside, outside)


def block_size(tokens: int, window: int) -> int:
    """Queries in a block: small blocks read fewer keys outside the band, large ones make fewer calls."""
    return max(window // 2, _MIN_BLOCK, -(-tokens // _MAX_BLOCKS))


def _band_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    band: Tensor,
    window: int,
    scale: float | None,
) -> Tensor:
    out = _like_attention(q)
    for start, stop, part_BSHD in _parts(q, k, v, mask, band, window, scale):
        here = out[:, start:stop]
        if residual is None:
            here.copy_(part_BSHD)
        else:
            torch.add(part_BSHD, residual[:, start:stop], out=here)
    return out


def _band_residual(
    full: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, band: Tensor, window: int, scale: float | None
) -> Tensor:
    out = _like_attention(q)
    for start, stop, part_BSHD in _parts(q, k, v, mask, band, window, scale):
        torch.sub(full[:, start:stop], part_BSHD, out=out[:, start:stop])
    return out


def _parts(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, band: Tensor, window: int, scale: float | None
) -> Iterator[tuple[int, int, Tensor]]:
    """Each block's first query, the first one after it, and its attention, [B, S, H, D]."""
    tokens = q.shape[2]
    size = block_size(tokens, window)
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        low, high = max(0, start - window), min(tokens, stop + window)
        keep = band[: stop - start, low - start + window : high - start + window]
        if mask is not None:
            own = _cut(_cut(mask, -2, start, stop), -1, low, high)
            keep = torch.where(own, keep, -math.inf) if own.dtype == torch.bool else own + keep
        part = scaled_dot_product_attention(
            q[:, :, start:stop], k[:, :, low:high], v[:, :, low:high], attn_mask=keep, scale=scale
        )
        yield start, stop, part.transpose(1, 2)


def _cut(mask: Tensor, axis: int, start: int, stop: int) -> Tensor:
    return mask if mask.shape[axis] == 1 else mask.narrow(axis, start, stop - start)


def _like_attention(q: Tensor) -> Tensor:
    batch, heads, tokens, width = q.shape
    return q.new_empty((batch, tokens, heads, width))


_library.impl("band_attention", _band_attention, "CompositeExplicitAutograd")
_library.impl("band_residual", _band_residual, "CompositeExplicitAutograd")
torch.library.register_fake("difa::band_attention", lambda q, *rest: _like_attention(q), lib=_library)
torch.library.register_fake("difa::band_residual", lambda full, q, *rest: _like_attention(q), lib=_library)
