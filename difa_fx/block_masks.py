"""Windows as flex_attention's block masks, without anything of size N x N.

A block mask lists, for every block of queries, the blocks of keys that it sees whole and those that the window cuts.

Letters: N tokens, S tokens of a block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


def block_lists(
    grid: tuple[int, ...],
    size: tuple[int, ...],
    text: tuple[int, int],
    device: torch.device,
    *,
    outside: bool = False,
) -> tuple[Tensor, ...]:
    """Four lists: (cut count, cut indices, whole count, whole indices), each [1, 1, blocks, ...].

    A band of one axis has them in closed form; otherwise they are read off the window, one row of blocks at a time.
    ``outside``: of all that the window leaves out.
    """
    if len(grid) == 1 and not any(text) and not outside:
        return _band_lists(grid[0], size[0], device)
    return _listed(grid, size, text, device, outside)


def _listed(
    grid: tuple[int, ...], size: tuple[int, ...], text: tuple[int, int], device: torch.device, outside: bool
) -> tuple[Tensor, ...]:
    tokens, block = math.prod(grid) + sum(text), block_size(device)
    blocks = -(-tokens // block)
    keys_N = torch.arange(tokens, device=device)
    some = torch.zeros(blocks, blocks, dtype=torch.bool, device=device)
    whole = torch.zeros_like(some)
    rest = blocks * block - tokens
    for row in range(blocks):
        queries_S = keys_N[row * block : (row + 1) * block]
        seen_SN = sees(queries_S[:, None], keys_N[None], grid, size, text) ^ outside
        any_N, all_N = seen_SN.any(0), seen_SN.all(0)
        some[row] = torch.nn.functional.pad(any_N, (0, rest)).view(blocks, block).any(1)
        whole[row] = torch.nn.functional.pad(all_N, (0, rest)).view(blocks, block).all(1)
    return (*_indices(some & ~whole), *_indices(whole))


def _indices(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns of each row are chosen, and which, those first."""
    order = torch.argsort((~chosen).to(torch.int8), dim=1, stable=True)
    return chosen.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None]


def sees(query: Tensor, key: Tensor, grid: tuple[int, ...], size: tuple[int, ...], text: tuple[int, int]) -> Tensor:
    """Whether a token sees another, for tensors of their positions in the sequence."""
    if len(grid) == 1 and not any(text):
        return (query - key).abs() <= size[0]
    image = math.prod(grid)
    q, k = query - text[0], key - text[0]
    stride = image
    near = None
    for length, reach in zip(grid, size, strict=True):
        stride //= length
        close = ((q // stride) % length - (k // stride) % length).abs() <= reach
        near = close if near is None else near & close
    assert near is not None
    return near | (q < 0) | (q >= image) | (k < 0) | (k >= image)


def _band_lists(tokens: int, window: int, device: torch.device) -> tuple[Tensor, ...]:
    """The band |i - j| <= window as flex_attention's block lists, in closed form: O(N / block) numbers a row.

    Key blocks that the band cuts are listed as partial, those that lie in it for every query of a block as full:
    (partial count, partial indices, full count, full indices).
    """
    size = block_size(device)
    blocks = -(-tokens // size)
    first_S = torch.arange(blocks, device=device) * size
    last_S = (first_S + size - 1).clamp(max=tokens - 1)
    low = (first_S - window).clamp(min=0) // size
    high = (last_S + window).clamp(max=tokens - 1) // size
    full_low = ((last_S - window).clamp(min=0) + size - 1) // size
    full_high = ((first_S + window + 1) // size).clamp(max=tokens // size) - 1
    full = (full_high - full_low + 1).clamp(min=0)
    left = torch.where(full > 0, full_low - low, high - low + 1)
    right = torch.where(full > 0, high - full_high, 0)
    index = torch.arange(blocks, device=device)[None]
    full_index = torch.where(index < full[:, None], full_low[:, None] + index, 0)
    after = full_high[:, None] + 1 + index - left[:, None]
    after = torch.where(index < (left + right)[:, None], after, 0)
    part_index = torch.where(index < left[:, None], low[:, None] + index, after)
    return tuple(t.to(torch.int32)[None, None] for t in (left + right, part_index, full, full_index))


def block_mask(
    grid: tuple[int, ...],
    size: tuple[int, ...],
    text: tuple[int, int],
    lists: tuple[Tensor, ...],
    *,
    outside: bool = False,
) -> BlockMask:
    """The block mask of a window, or of what it leaves out, from what :func:`block_lists` gave."""
    tokens = math.prod(grid) + sum(text)

    def in_window(b: Tensor, h: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
        return sees(q_index, kv_index, grid, size, text) ^ outside

    in_window.__annotations__.clear()  # torch 2.11 cannot keep a graph in its cache with annotations that are strings

    cut_count, cut_index, whole_count, whole_index = lists
    return BlockMask.from_kv_blocks(
        cut_count,
        cut_index,
        whole_count,
        whole_index,
        BLOCK_SIZE=block_size(lists[0].device),
        mask_mod=in_window,
        seq_lengths=(tokens, tokens),
        compute_q_blocks=False,
    )


def block_size(device: torch.device) -> int:
    """Tokens of a block."""
    return 64 if device.type == "cpu" else 128
