"""Window attention on CPU by a kernel of our own, ``cpu_window.cpp``: in float32, along one axis, with text or without.

The source is built by the C++ compiler that Inductor uses, and kept where nobody but the user can write.

Letters: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from difa_fx._torch import build_cpp, cache_folder
from difa_fx.banded import like_attention
from difa_fx.private_folder import kernels_folder
from difa_fx.window_ops import implement

_SOURCE: Final = Path(__file__).with_name("cpu_window.cpp")
_POINTER: Final = ctypes.c_void_p
_SIZE: Final = ctypes.c_int64

SERVED: Final = "float32 on cpu, and a C++ compiler"
"""What the kernel is for, to people."""


def fits(like: Tensor, grid: Sequence[int]) -> bool:
    """Whether the kernel is for such tensors and windows."""
    return like.device.type == "cpu" and like.dtype == torch.float32 and len(grid) == 1


def serves(like: Tensor, grid: Sequence[int]) -> bool:
    """Whether the kernel can be used for them; builds it where that is all that is missing."""
    return fits(like, grid) and _kernel() is not None


@functools.cache
def build_in_background() -> None:
    """Begin to build the kernel, in the background; once."""
    threading.Thread(target=_kernel, name="difa-cpu-window", daemon=True).start()


@functools.cache
def _kernel() -> Callable[..., None] | None:
    """The kernel, built once; None, after a warning, where there is no compiler for it."""
    try:
        kernel = build_cpp(_SOURCE.read_text(encoding="utf-8"), kernels_folder(cache_folder())).difa_window
    except (RuntimeError, OSError) as error:
        warnings.warn(
            f"the C++ kernel for windows cannot be built, so they run as tiles, which is slower: {error}", stacklevel=2
        )
        return None
    kernel.argtypes = [*[_POINTER] * 8, *[_SIZE] * 3, ctypes.c_float, ctypes.c_int]
    kernel.restype = None
    return kernel


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
    """The two operators, see :class:`difa_fx.window_ops.Attend`."""
    kernel = _kernel()
    assert kernel is not None
    batch, heads, tokens, width = q.shape
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    residual = None if residual is None else residual.contiguous()
    out, *missed = (like_attention(q) for _ in range(1 + refresh))
    kernel(
        *(None if t is None else t.data_ptr() for t in (q, k, v, residual, out, missed[0] if missed else None)),
        (_SIZE * 4)(batch, heads, tokens, width),
        (_SIZE * 9)(*(stride for t in (q, k, v) for stride in t.stride()[:3])),
        window,
        *text,
        width**-0.5 if scale is None else scale,
        torch.get_num_threads(),
    )
    return (out, *missed)


implement("CPU", attend)
