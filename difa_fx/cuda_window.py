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
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from difa_fx.banded import like_attention
from difa_fx.cuda_launch import Operands, launcher
from difa_fx.window_ops import implement

SERVED: Final = "float16 or bfloat16 on cuda, with triton"
"""What the kernel is for, to people."""


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
    width = q.shape[-1]
    scale = width**-0.5 if scale is None else scale
    if scale < 0:  # the kernel takes the maximum before it scales
        q, scale = -q, -scale
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    residual = None if residual is None else residual.contiguous()
    out, missed = like_attention(q), like_attention(q) if refresh else None
    operands = Operands(q, k, v, residual, out, missed)
    launch = launcher(operands.form(window=window, text=tuple(text), scale=scale, maps=maps))
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        launch(operands)
    return (out,) if missed is None else (out, missed)


implement("CUDA", attend)
