"""Window attention on CUDA by a kernel of our own, in Triton: half precision, along one axis, with text or without.

DiTFastAttn's window attention and its residual (arXiv 2406.08552, section 3.2) at the cost of the keys in the window,
and full attention with a new residual at little more than that of full attention.  The code is in
:mod:`difa_fx.cuda_kernels`, which is imported when it is needed first; how it is cut into blocks, Triton's autotuner
tries out at the first call with each shape.

Letters: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from difa_fx.banded import like_attention
from difa_fx.window_ops import implement

Blocks = tuple[int, int, int, int, int | None]
"""Queries of a block, keys of a tile, warps, stages of the pipeline that loads tiles, and registers if few."""

SERVED: Final = "float16 or bfloat16 on cuda, with triton"
"""What the kernel is for, to people."""

_TRACED: Final[Blocks] = (32, 16, 4, 1, None)
"""For Triton's interpreter, which is what runs kernels on tensors of the CPU: small, so that small tests have many."""


def fits(like: Tensor, grid: Sequence[int]) -> bool:
    """Whether the kernel is for such tensors and windows."""
    half = like.dtype in (torch.float16, torch.bfloat16)
    return like.device.type == "cuda" and half and len(grid) == 1


def serves(like: Tensor, grid: Sequence[int]) -> bool:
    """Whether the kernel can be used for them: triton is there, too."""
    return fits(like, grid) and has_triton()


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed; does not import it."""
    return importlib.util.find_spec("triton") is not None


def columns(width: int) -> tuple[int, int]:
    """A head's width as two powers of two, the second filled up, or 0."""
    head = max(16, 1 << (width.bit_length() - 1))
    rest = max(0, width - head)
    return head, max(16, 1 << (rest - 1).bit_length()) if rest else 0


def blocks(width: int, *, refresh: bool) -> tuple[Blocks, ...]:
    """What is worth a try, the likeliest first.

    Up to width 256 the loops keep all that they need in registers (compiled for sm_90), and use its wgmma.  With 128
    registers a multiprocessor has two blocks of eight warps or four of four: one computes weights while another's
    products run.
    """
    if width <= 80:
        return (
            (128, 64, 8, 3, 128),
            (64, 64, 4, 2 if refresh else 3, 128),
            (64, 64, 4, 2, 168 if refresh else 128),
            (128, 64, 4, 3, None),
            (64, 128, 4, 2, None),
        )
    if width <= 128:
        return (128, 64, 8, 3, None), (128, 32, 8, 3, None), (64, 64, 4, 2, None)
    if width <= 160:
        return (128, 32, 8, 3, None), (64, 64, 8, 2, None)
    return ((64, 32, 8, 2, None),) if width <= 256 else ((64, 16, 8, 2, None),)


@functools.cache
def _tuned(width: int, *, refresh: bool, mapped: bool) -> Any:
    """The kernel, with what the autotuner may try."""
    import triton

    from difa_fx.cuda_kernels import near_kernel

    configs = [configured(settings) for settings in blocks(width, refresh=refresh)]
    return triton.autotune(configs, key=["heads", "tokens", "window", "WIDTH"])(near_kernel)


def configured(blocks: Blocks) -> Any:
    """Blocks for the autotuner."""
    import triton

    queries, keys, warps, stages, registers = blocks
    tiles = {"BLOCK_M": queries, "BLOCK_L": keys}
    return triton.Config(tiles, num_warps=warps, num_stages=stages, maxnreg=registers, pre_hook=_cut)


def _cut(arguments: dict[str, Any]) -> None:
    """Let the maps be of tiles as long as the autotuner wants."""
    for name in _MAPS:
        if arguments[name] is not None:
            arguments[name].block_shape[2] = arguments["BLOCK_L"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor | None,
    window: int,
    text: Sequence[int],
    scale: float | None,
    *,
    refresh: bool,
) -> tuple[Tensor, ...]:
    """The two operators, see :class:`difa_fx.window_ops.Attend`; of CPU tensors in Triton's interpreter only."""
    if q.device.type == "cpu":
        from difa_fx.cuda_kernels import near_kernel

        *tiles, warps, stages, _ = _TRACED
        blocks = dict(zip(("BLOCK_M", "BLOCK_L"), tiles, strict=True))
        return launch(near_kernel, q, k, v, residual, window, text, scale, refresh=refresh, mapped=True, blocks=blocks)
    mapped = torch.cuda.get_device_capability(q.device)[0] >= 9
    kernel = _tuned(q.shape[3], refresh=refresh, mapped=mapped)
    return launch(kernel, q, k, v, residual, window, text, scale, refresh=refresh, mapped=mapped)


implement("CUDA", attend)
