"""Window attention by every kernel that runs on this machine, against dense attention with the window as its mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from difa_fx import attention
from difa_fx.block_masks import block_lists
from difa_fx.cost import window_pairs
from difa_fx.plan import GridWindow

SHAPES = [
    ((5,), (1,), (0, 0)),
    ((64,), (0,), (0, 0)),
    ((65,), (7,), (0, 0)),
    ((257,), (100,), (0, 0)),
    ((200,), (300,), (0, 0)),
    ((200,), (20,), (13, 0)),
    ((130,), (9,), (0, 7)),
    ((130,), (9,), (5, 3)),
    ((8, 8), (2, 1), (0, 0)),
    ((13, 17), (3, 5), (0, 0)),
    ((16, 16), (4, 20), (11, 0)),
    ((3, 9, 7), (1, 2, 2), (0, 6)),
    ((5, 6, 6), (0, 6, 1), (0, 0)),
]
"""Grid, size of the window, text before and after."""


def dense_window(grid: tuple[int, ...], size: tuple[int, ...], text: tuple[int, int]) -> Tensor:
    """Bool [N, N], token by token: by coordinates, and everything for text."""
    image = math.prod(grid)
    places = torch.cartesian_prod(*(torch.arange(length) for length in grid)).reshape(image, len(grid))
    near = ((places[:, None] - places[None]).abs() <= torch.tensor(size)).all(-1)
    seen = torch.ones(image + sum(text), image + sum(text), dtype=torch.bool)
    seen[text[0] : text[0] + image, text[0] : text[0] + image] = near
    return seen


@pytest.mark.parametrize("masked", [None, "bool", "bias"])
@pytest.mark.parametrize(("grid", "size", "text"), SHAPES)
def test_tiles_are_dense_attention_in_the_window(
    grid: tuple[int, ...], size: tuple[int, ...], text: tuple[int, int], masked: str | None
) -> None:
    tokens = math.prod(grid) + sum(text)
    q, k, v = (torch.randn(2, 3, tokens, 8) for _ in range(3))
    mask = {None: None, "bool": torch.rand(2, 1, 1, tokens) > 0.3, "bias": torch.randn(2, 1, tokens, tokens)}[masked]
    constants = attention.window_tensors("sdpa", grid=grid, size=size, text=text, like=q)
    settings: dict[str, Any] = {"grid": grid, "size": size, "text": text}
    got = attention.window_attention(q, k, v, mask, *constants, **settings)
    near = dense_window(grid, size, text)
    seen = near if mask is None else near & mask if masked == "bool" else mask.masked_fill(~near, -torch.inf)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    full = torch.randn(2, 3, tokens, 8)
    residual = attention.window_residual(full, q, k, v, mask, *constants, **settings)
    torch.testing.assert_close(residual, (full - expected).transpose(1, 2), rtol=1e-4, atol=1e-5)
    again = attention.window_attention(q, k, v, mask, *constants, residual_BNHD=residual, **settings)
    torch.testing.assert_close(again, full, rtol=1e-4, atol=1e-5)


LISTED = [s for s in SHAPES if not attention.covers(s[0], s[1])]
LISTED += [((n,), (w,), (0, 0)) for n in (64, 100, 333, 1000) for w in (0, 3, 63, 64, 65, 130, 500) if w < n - 1]
LISTED += [((20, 30), (5, 4), (70, 0)), ((300,), (40,), (10, 64))]


@pytest.mark.parametrize(("grid", "size", "text"), LISTED)
def test_block_lists_cover_the_window_exactly(
    grid: tuple[int, ...], size: tuple[int, ...], text: tuple[int, int]
) -> None:
    block = 64
    near = dense_window(grid, size, text)
    tokens = len(near)
    cut, cut_index, whole, whole_index = (t[0, 0].tolist() for t in block_lists(grid, size, text, torch.device("cpu")))
    for row in range(len(cut)):
        rows = near[row * block : (row + 1) * block]
        columns = range(-(-tokens // block))
        touched = {c for c in columns if rows[:, c * block : (c + 1) * block].any()}
        inside = {c for c in touched if (c + 1) * block <= tokens and rows[:, c * block : (c + 1) * block].all()}
        listed = cut_index[row][: cut[row]]
        full = whole_index[row][: whole[row]]
        assert len(set(listed) | set(full)) == cut[row] + whole[row]
        assert set(listed) | set(full) == touched
        assert set(full) <= inside


@pytest.mark.parametrize(("grid", "size", "text"), SHAPES)
def test_pairs_are_counted_exactly(grid: tuple[int, ...], size: tuple[int, ...], text: tuple[int, int]) -> None:
    window = size[0] if len(grid) == 1 else GridWindow(grid, size)
    assert window_pairs(math.prod(grid), window) == int(dense_window(grid, size, (0, 0)).sum())
