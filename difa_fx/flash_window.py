"""Window attention by FlashAttention: through torch, or through the flash-attn package where it is installed.

FlashAttention-2 (arXiv 2307.08691) and 3 (arXiv 2407.08608) have a sliding window of their own.  Both need CUDA and
half precision, and know windows along one axis, without text.

Letters: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor

from difa_fx import cuda_window
from difa_fx.banded import like_attention

PACKAGES: Final = ("flash_attn_interface", "flash_attn")
"""What flash-attn installs, the third version first."""

_library: Any = torch.library.Library("difa", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("flash_window(Tensor q, Tensor k, Tensor v, int window, float? scale) -> Tensor")
torch.library.register_fake("difa::flash_window", lambda q, *rest: like_attention(q), lib=_library)

flash_window = torch.ops.difa.flash_window.default
"""Attention within the window by the flash-attn package, [B, N, H, D]; q, k and v are [B, H, N, D]."""


def fits(like: Tensor, grid: Sequence[int], text: Sequence[int]) -> bool:
    """Whether FlashAttention is for such tensors and windows."""
    return cuda_window.fits(like, grid) and not any(text)


@functools.cache
def package() -> str | None:
    """The package that is installed."""
    return next((name for name in PACKAGES if importlib.util.find_spec(name) is not None), None)


@functools.cache
def _attend() -> Callable[..., Any]:
    name = package()
    assert name is not None
    found: Callable[..., Any] = importlib.import_module(name).flash_attn_func
    return found


def _flash_window(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = _attend()(q, k, v, softmax_scale=scale, window_size=(window, window))
    # The third version gives the sums of exponentials, too.
    return cast(Tensor, out[0] if isinstance(out, tuple) else out).contiguous()


_library.impl("flash_window", _flash_window, "CUDA")


def torch_flash_window(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    """The same through torch, which packs all samples one after the other; [B, N, H, D]."""
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, tokens, width = q.shape
    packed_q, packed_k, packed_v = (t.transpose(1, 2).reshape(batch * tokens, heads, width) for t in (q, k, v))
    ends = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=q.device)
    out = varlen_attn(
        packed_q, packed_k, packed_v, ends, ends, tokens, tokens, scale=scale, window_size=(window, window)
    )
    return cast(Tensor, out).view(batch, tokens, heads, width)
