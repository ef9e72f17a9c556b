"""Attention within a window as operators of their own: a call of SDPA for each tile of queries, on slices of the keys.

The tokens are a grid of one axis or more, flattened; a tile is a box of it, and the keys it sees are the box around
it.  Along one axis both are slices, which are views; each tile's result is written once, with the residual added or
taken on the way, while it is still in cache.  Text tokens before and after the grid see everything and are seen by
everything (the *arrow* of DiTFastAttn V2, arXiv 2503.22796).  To a compiler each operator is opaque, so that a window
costs nothing to trace or to generate code for.  They run on every device; on CPU they are the default.

Letters: B batch, H heads, N tokens, D head width, S queries of a tile, L keys that it sees.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

_MIN_BLOCK: Final = 64
_MAX_BLOCKS: Final = 32

_library: Any = torch.library.Library("difa", "DEF")  # type: ignore[no-untyped-call]
_QKV = "Tensor q, Tensor k, Tensor v, Tensor? mask"
_BAND = "Tensor bias, int[] grid, int[] size, int[] text, float? scale"
_library.define(f"band_attention({_QKV}, Tensor? residual, {_BAND}) -> Tensor")
_library.define(f"band_residual(Tensor full, {_QKV}, {_BAND}) -> Tensor")

band_attention = torch.ops.difa.band_attention.default
"""Attention within the window, plus ``residual`` if there is one, [B, N, H, D]; q, k and v are [B, H, N, D]."""

band_residual = torch.ops.difa.band_residual.default
"""``full`` minus attention within the window, [B, N, H, D]."""

Box = tuple[slice, ...]
"""A part of a grid, axis by axis."""


def tile_bias(grid: Sequence[int], size: Sequence[int], like: Tensor, *, tile: tuple[int, ...] | None = None) -> Tensor:
    """What both operators add to the scores of one tile: axes of the tile, then axes of the box around it.

    Along one axis [S, S + 2 w].  ``tile`` is :func:`tile_shape`'s unless it is given.
    """
    outside = torch.tensor(-math.inf, dtype=like.dtype, device=like.device)
    inside = torch.zeros((), dtype=like.dtype, device=like.device)
    near = torch.ones((), dtype=torch.bool, device=like.device)
    tile, axes = tile_shape(grid, size), len(grid)
    for axis, (rows, reach) in enumerate(zip(tile, size, strict=True)):
        row = torch.arange(rows, device=like.device)[:, None]
        column = torch.arange(rows + 2 * reach, device=like.device)[None] - reach
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = rows, rows + 2 * reach
        near = near & ((row - column).abs() <= reach).view(shape)
    return torch.where(near, inside, outside)


def tile_shape(grid: Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
    """Queries in a tile: small tiles read fewer keys outside the window, large ones make fewer calls."""
    if len(grid) == 1:
        return (min(grid[0], max(size[0] // 2, _MIN_BLOCK, -(-grid[0] // _MAX_BLOCKS))),)
    least = max(_MIN_BLOCK, math.prod(grid) // _MAX_BLOCKS)
    tile = [min(length, max(1, reach // 2)) for length, reach in zip(grid, size, strict=True)]
    while math.prod(tile) < min(least, math.prod(grid)):
        axis = min((a for a in range(len(grid)) if tile[a] < grid[a]), key=lambda a: (tile[a] / (size[a] + 1), -a))
        tile[axis] = min(grid[axis], 2 * tile[axis])
    return tuple(tile)


def _band_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    bias: Tensor,
    grid: Sequence[int],
    size: Sequence[int],
    text: Sequence[int],
    scale: float | None,
) -> Tensor:
    out = like_attention(q)
    for place, part_BSHD in _parts(q, k, v, mask, bias, grid, size, text, scale):
        here = place(out)
        if residual is None:
            here.copy_(part_BSHD)
        else:
            torch.add(part_BSHD, place(residual), out=here)
    return out


def _band_residual(
    full: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor,
    grid: Sequence[int],
    size: Sequence[int],
    text: Sequence[int],
    scale: float | None,
) -> Tensor:
    out = like_attention(q)
    for place, part_BSHD in _parts(q, k, v, mask, bias, grid, size, text, scale):
        torch.sub(place(full), part_BSHD, out=place(out))
    return out


Part = tuple[Callable[[Tensor], Tensor], Tensor]
"""Where a tile's result stands in a tensor [B, N, H, D], and the result in that place's shape."""


def _parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor,
    grid: Sequence[int],
    size: Sequence[int],
    text: Sequence[int],
    scale: float | None,
) -> Iterator[Part]:
    """The attention of every tile, and of the text before and after the grid."""
    image = math.prod(grid)
    lead, tail = text
    for tile, seen in _boxes(grid, size):
        keep = _bias_of(bias, tile, seen, size, text)
        if mask is not None:
            own = _seen(_rows(mask, -2, tile, grid, lead), -1, seen, grid, text)
            keep = torch.where(own, keep, -math.inf) if own.dtype == torch.bool else own + keep
        part_BHSD = scaled_dot_product_attention(
            _rows(q, 2, tile, grid, lead),
            _seen(k, 2, seen, grid, text),
            _seen(v, 2, seen, grid, text),
            attn_mask=keep,
            scale=scale,
        )
        yield _place(tile, grid, lead), _unflattened(part_BHSD.transpose(1, 2), tile)
    for start, count in ((0, lead), (lead + image, tail)):
        if count:
            whole = mask if mask is None or mask.shape[-2] == 1 else mask.narrow(-2, start, count)
            part_BHSD = scaled_dot_product_attention(q.narrow(2, start, count), k, v, attn_mask=whole, scale=scale)
            yield partial(_narrowed, start=start, count=count), part_BHSD.transpose(1, 2)


def _narrowed(x_BNHD: Tensor, *, start: int, count: int) -> Tensor:
    return x_BNHD.narrow(1, start, count)


def _boxes(grid: Sequence[int], size: Sequence[int]) -> Iterator[tuple[Box, Box]]:
    """Every tile and the box of keys that it sees."""
    tile = tile_shape(grid, size)
    for corner in itertools.product(*(range(0, length, step) for length, step in zip(grid, tile, strict=True))):
        ends = [min(c + step, length) for c, step, length in zip(corner, tile, grid, strict=True)]
        box = tuple(slice(c, end) for c, end in zip(corner, ends, strict=True))
        around = zip(box, size, grid, strict=True)
        yield box, tuple(slice(max(0, s.start - reach), min(length, s.stop + reach)) for s, reach, length in around)


def _bias_of(bias: Tensor, tile: Box, seen: Box, size: Sequence[int], text: Sequence[int]) -> Tensor:
    """The bias of one tile, [S, L]: less at the edges of the grid, and with nothing hidden of the text."""
    rows = [slice(0, s.stop - s.start) for s in tile]
    moved = zip(tile, seen, size, strict=True)
    columns = [slice(b.start - a.start + reach, b.stop - a.start + reach) for a, b, reach in moved]
    own = bias[tuple(rows + columns)]
    if len(tile) > 1:
        own = own.flatten(0, len(tile) - 1).flatten(1)
    return pad(own, (text[0], text[1])) if any(text) else own


def _rows(x: Tensor, axis: int, box: Box, grid: Sequence[int], lead: int) -> Tensor:
    """The tokens of ``box`` along an axis of all tokens, which may be one that is broadcast."""
    if x.shape[axis] == 1:
        return x
    if len(grid) == 1:
        return x.narrow(axis, lead + box[0].start, box[0].stop - box[0].start)
    axis %= x.ndim
    boxed = _on_grid(x.narrow(axis, lead, math.prod(grid)), axis, grid)
    return boxed[(slice(None),) * axis + box].flatten(axis, axis + len(grid) - 1)


def _seen(x: Tensor, axis: int, box: Box, grid: Sequence[int], text: Sequence[int]) -> Tensor:
    """The tokens of ``box`` and the text around the grid."""
    inner = _rows(x, axis, box, grid, text[0])
    if x.shape[axis] == 1 or not any(text):
        return inner
    before = x.narrow(axis, 0, text[0])
    return torch.cat((before, inner, x.narrow(axis, x.shape[axis] - text[1], text[1])), axis)


def _place(box: Box, grid: Sequence[int], lead: int) -> Callable[[Tensor], Tensor]:
    if len(grid) == 1:
        return partial(_narrowed, start=lead + box[0].start, count=box[0].stop - box[0].start)
    image = math.prod(grid)
    return lambda x: _on_grid(x.narrow(1, lead, image), 1, grid)[(slice(None),) + box]  # noqa: RUF005


def _unflattened(part_BSHD: Tensor, box: Box) -> Tensor:
    return part_BSHD if len(box) == 1 else _on_grid(part_BSHD, 1, [s.stop - s.start for s in box])


def _on_grid(x: Tensor, axis: int, grid: Sequence[int]) -> Tensor:
    return x.unflatten(axis, list(grid))  # type: ignore[no-untyped-call, no-any-return]


def like_attention(q: Tensor) -> Tensor:
    """Memory for attention's result, [B, N, H, D]; q is [B, H, N, D]."""
    batch, heads, tokens, width = q.shape
    return q.new_empty((batch, tokens, heads, width))


_library.impl("band_attention", _band_attention, "CompositeExplicitAutograd")
_library.impl("band_residual", _band_residual, "CompositeExplicitAutograd")
torch.library.register_fake("difa::band_attention", lambda q, *rest: like_attention(q), lib=_library)
torch.library.register_fake("difa::band_residual", lambda full, q, *rest: like_attention(q), lib=_library)
