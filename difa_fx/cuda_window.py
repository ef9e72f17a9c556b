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

Blocks = tuple[int, int, int, int]
"""Queries of a block, keys of a tile, warps and stages of the pipeline that loads tiles."""

SERVED: Final = "float16 or bfloat16 on cuda, with triton"
"""What the kernel is for, to people."""

_TRACED: Final[Blocks] = (32, 16, 4, 1)
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

    Up to width 256 the loops keep all that they need in registers (compiled for sm_90), and use its wgmma.
    """
    if width <= 80:
        return ((128, 64, 8, 3), (64, 64, 4, 3), (128, 32, 8, 3), (64, 32, 4, 3) if refresh else (128, 128, 8, 2))
    if width <= 128:
        return ((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 4, 3) if refresh else (64, 64, 4, 3))
    if width <= 160:
        return ((128, 32, 8, 3), (64, 64, 8, 2))
    return ((64, 32, 8, 2),) if width <= 256 else ((64, 16, 8, 2),)


@functools.cache
def _tuned(width: int, *, refresh: bool) -> Any:
    """The kernel, with what the autotuner may try."""
    import triton

    from difa_fx.cuda_kernels import near_kernel

    configs = [
        triton.Config({"BLOCK_M": queries, "BLOCK_L": keys}, num_warps=warps, num_stages=stages)
        for queries, keys, warps, stages in blocks(width, refresh=refresh)
    ]
    return triton.autotune(configs, key=["heads", "tokens", "window", "WIDTH"])(near_kernel)


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
    batch, heads, tokens, width = q.shape
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    residual = None if residual is None else residual.contiguous()
    out, *missed = (like_attention(q) for _ in range(1 + refresh))
    scale = width**-0.5 if scale is None else scale
    if scale < 0:  # the kernel takes the maximum before it scales
        q, scale = -q, -scale
    strides = [t.stride(axis) if t.shape[axis] > 1 else 0 for t in (q, k, v) for axis in range(3)]
    unit = math.gcd(8, *strides)
    head, tail = columns(width)
    settings: dict[str, Any] = {"UNIT": unit, "WIDTH": width, "HEAD": head, "TAIL": tail, "TEXT": any(text)}
    settings["enable_fp_fusion"] = True  # newer versions of triton ask to be told

    def programs(meta: dict[str, Any]) -> tuple[int]:
        block = meta["BLOCK_M"]
        return (batch * heads * (-(-(tokens - sum(text)) // block) + -(-sum(text) // block)),)

    if q.device.type == "cpu":
        from difa_fx.cuda_kernels import near_kernel

        kernel = near_kernel
        settings |= dict(zip(("BLOCK_M", "BLOCK_L", "num_warps", "num_stages"), _TRACED, strict=True))
    else:
        kernel = _tuned(width, refresh=refresh)
    tensors = (q, k, v, residual, out, missed[0] if missed else None)
    numbers = (heads, tokens, min(window, tokens), *text, scale * math.log2(math.e))
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        kernel[programs](*tensors, *(stride // unit for stride in strides), *numbers, **settings)
    return (out, *missed)


implement("CUDA", attend)
