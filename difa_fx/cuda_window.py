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

TRACED: Final[Blocks] = (32, 16, 4, 1, None)
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


def blocks(width: int) -> tuple[Blocks, ...]:
    """What is worth a try; up to width 80 each was the fastest somewhere, on an H200.

    Up to width 256 the loops keep all that they need in registers (compiled for sm_90), and use its wgmma.  With 128
    registers a multiprocessor has two blocks of eight warps or four of four: one computes weights while another's
    products run.
    """
    if width <= 80:
        return (128, 64, 8, 3, 128), (64, 64, 4, 2, 128), (128, 64, 4, 3, None)
    if width <= 128:
        return (128, 64, 8, 3, None), (128, 32, 8, 3, None), (64, 64, 4, 2, None)
    if width <= 160:
        return (128, 32, 8, 3, None), (64, 64, 8, 2, None)
    return ((64, 32, 8, 2, None),) if width <= 256 else ((64, 16, 8, 2, None),)


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
    maps: bool = True,
) -> tuple[Tensor, ...]:
    """The two operators, see :class:`difa_fx.window_ops.Attend`; of CPU tensors in Triton's interpreter only.

    Blocks are of the sizes that the autotuner finds.  ``maps``: whether tiles may be loaded through tensor maps.
    """
    traced = q.device.type == "cpu"
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
    maps = maps and all(mappable(t) for t in (k, v))
    settings: dict[str, Any] = {"UNIT": unit, "WIDTH": width, "HEAD": head, "TAIL": tail, "TEXT": any(text)}
    settings["enable_fp_fusion"] = True  # newer versions of triton ask to be told

    def programs(meta: dict[str, Any]) -> tuple[int]:
        block = meta["BLOCK_M"]
        return (batch * heads * (-(-(tokens - sum(text)) // block) + -(-sum(text) // block)),)

    if not traced:
        kernel = _tuned(width, refresh, maps)
    else:
        from difa_fx.cuda_kernels import near_kernel as kernel

        settings |= dict(zip(("BLOCK_M", "BLOCK_L", "num_warps", "num_stages", "maxnreg"), TRACED, strict=True))
    tiles = [
        _tiles(t, size, settings.get("BLOCK_L", 16)) if maps and size else None for t in (k, v) for size in (head, tail)
    ]
    tensors = (q, k, v, *tiles, residual, out, missed[0] if missed else None)
    numbers = (heads, tokens, min(window, tokens), *text, scale * math.log2(math.e))
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        kernel[programs](*tensors, *(stride // unit for stride in strides), *numbers, **settings)
    return (out, *missed)


@functools.cache
def _tuned(width: int, refresh: bool, maps: bool) -> Any:
    """The kernel, with what the autotuner may try; what it found for windows says nothing of refreshing steps."""
    import triton

    from difa_fx.cuda_kernels import near_kernel

    configs = [
        triton.Config(
            {"BLOCK_M": queries, "BLOCK_L": keys},
            num_warps=warps,
            num_stages=stages,
            maxnreg=registers,
            pre_hook=_cut if maps else None,
        )
        for queries, keys, warps, stages, registers in blocks(width)
    ]
    return triton.autotune(configs, key=["heads", "tokens", "window", "WIDTH"])(near_kernel)


def _cut(arguments: dict[str, Any]) -> None:
    """Let tiles be as long as the autotuner wants them."""
    for name in ("k_map", "k_tail_map", "v_map", "v_tail_map"):
        if arguments[name] is not None:
            arguments[name].block_shape[2] = arguments["BLOCK_L"]


def mappable(tensor: Tensor) -> bool:
    """Whether the memory unit of sm_90 can load tiles of it: rows at multiples of 16 bytes, and none twice."""
    if tensor.device.type == "cuda" and torch.cuda.get_device_capability(tensor.device) < (9, 0):
        return False
    steps = [tensor.stride(axis) for axis in range(3) if tensor.shape[axis] > 1]
    size = tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and all(step > 0 and step * size % 16 == 0 for step in steps)


def _tiles(tensor: Tensor, columns: int, length: int) -> Any:
    """A map of tiles of keys or values, so many columns and keys; what lies outside the tensor is zeros."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    # An axis of size 1 may have any stride; 16 is one that serves.
    strides = [tensor.stride(axis) if tensor.shape[axis] > 1 else 16 for axis in range(3)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, length, columns])


implement("CUDA", attend)
