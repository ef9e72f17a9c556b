"""The functions that stand in rewritten graphs: window attention, cached output, CFG halves.

A rewrite puts them in as ``call_function`` targets, so a printed graph shows them by name; the compiler traces
through them.  All are pure, keep dtype and device, and never make an N x N tensor.

Letters: B batch, H heads, N tokens, D head width, S block of queries, L keys of a block.
"""

from __future__ import annotations

import math
from typing import Final, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from difa_fx import cpu_window, cuda_window, flash_window
from difa_fx._torch import flex_band, flex_with_lse
from difa_fx.banded import band_attention, band_residual, tile_bias
from difa_fx.block_masks import block_lists, block_mask
from difa_fx.errors import OptionError
from difa_fx.window_ops import near_refresh, near_window

WindowKernel = Literal["cpp", "triton", "flex", "flash", "flash_attn", "sdpa"]
WINDOW_KERNELS: Final = ("auto", "cpp", "triton", "flex", "flash", "flash_attn", "sdpa")
OWN_KERNELS: Final = {"cpp": cpu_window, "triton": cuda_window}
"""Where the implementations of :mod:`difa_fx.window_ops` are."""
FLASH_KERNELS: Final = ("flash", "flash_attn")


def window_attention(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    mask: Tensor | None,
    *constants: Tensor,
    grid: tuple[int, ...],
    size: tuple[int, ...],
    text: tuple[int, int] = (0, 0),
    residual_BNHD: Tensor | None = None,
    scale: float | None = None,
    kernel: WindowKernel = "sdpa",
) -> Tensor:
    """Attention of each token to the tokens in the window around it, plus the stored residual.

    DiTFastAttn, section 3.2: WA, and with a residual WA-RS.  With text the *arrow* of its version 2 (arXiv
    2503.22796): image tokens see all text and the window, text tokens see everything.

    Args:
        mask: the model's own mask, bool or additive, that broadcasts to [B, H, N, N]; ``sdpa`` only.
        constants: what :func:`window_tensors` made for this kernel and window.
        grid: the image tokens as they are flattened: (N,), rows and columns, or frames, rows and columns.
        size: how far the window reaches along each axis of the grid, to either side.
        text: how many text tokens stand before and after the grid.
        residual_BNHD: what :func:`window_residual` gave at a full step.
        scale: of the scores; 1 / sqrt(D) when None.
        kernel: which implementation; :func:`choose_kernel` picks one.

    Returns:
        [B, H, N, D], in the layout scaled_dot_product_attention gives.
    """
    if kernel in OWN_KERNELS:
        out_BNHD = near_window(q_BHND, k_BHND, v_BHND, residual_BNHD, size[0], list(text), scale)
        return cast(Tensor, out_BNHD.transpose(1, 2))
    if kernel == "sdpa" and constants:
        settings = (list(grid), list(size), list(text), scale)
        out_BNHD = band_attention(q_BHND, k_BHND, v_BHND, mask, residual_BNHD, constants[0], *settings)
        return cast(Tensor, out_BNHD.transpose(1, 2))
    out_BHND = _window(q_BHND, k_BHND, v_BHND, mask, constants, grid, size, text, scale, kernel)
    return out_BHND if residual_BNHD is None else out_BHND + residual_BNHD.transpose(1, 2)


def window_residual(
    full_BHND: Tensor,
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    mask: Tensor | None,
    *constants: Tensor,
    grid: tuple[int, ...],
    size: tuple[int, ...],
    text: tuple[int, int] = (0, 0),
    scale: float | None = None,
    kernel: WindowKernel = "sdpa",
) -> Tensor:
    """What window attention misses of full attention, [B, N, H, D]: stored at a full step, added at window steps."""
    full_BNHD = full_BHND.transpose(1, 2)
    if kernel == "sdpa" and constants:
        settings = (list(grid), list(size), list(text), scale)
        return cast(Tensor, band_residual(full_BNHD, q_BHND, k_BHND, v_BHND, mask, constants[0], *settings))
    out_BHND = _window(q_BHND, k_BHND, v_BHND, mask, constants, grid, size, text, scale, kernel)
    return (full_BNHD - out_BHND.transpose(1, 2)).contiguous()


def refreshed_attention(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    *constants: Tensor,
    grid: tuple[int, ...],
    size: tuple[int, ...],
    text: tuple[int, int] = (0, 0),
    scale: float | None = None,
    kernel: WindowKernel,
) -> tuple[Tensor, Tensor]:
    """Full attention, [B, H, N, D], and what window attention misses of it, [B, N, H, D], at once.

    Attention outside the window is computed beside attention in it, and the two are merged by their sums of
    exponentials: with s the share of those outside, ``residual = s (outside - window)``, ``full = window + residual``.

    Args:
        constants: what :func:`refresh_tensors` made for this kernel and window.
        kernel: one that :func:`refreshes_at_once`.
    """
    if kernel in OWN_KERNELS:
        full_BNHD, missed_BNHD = near_refresh(q_BHND, k_BHND, v_BHND, size[0], list(text), scale)
        return full_BNHD.transpose(1, 2), missed_BNHD
    inside, outside = (block_mask(grid, size, text, constants[i : i + 4], outside=bool(i)) for i in (0, 4))
    window_BHND, lse_BHN = flex_with_lse(q_BHND, k_BHND, v_BHND, inside, scale)
    rest_BHND, rest_lse_BHN = flex_with_lse(q_BHND, k_BHND, v_BHND, outside, scale)
    share_BHN1 = torch.sigmoid((rest_lse_BHN - lse_BHN) * math.log(2)).unsqueeze(-1)
    missed_BHND = (share_BHN1 * (rest_BHND - window_BHND)).to(q_BHND.dtype)
    return window_BHND + missed_BHND, missed_BHND.transpose(1, 2).contiguous()


def refreshes_at_once(kernel: WindowKernel, *, like: Tensor) -> bool:
    """Whether :func:`refreshed_attention` can stand for full attention and :func:`window_residual`."""
    return kernel in OWN_KERNELS or (kernel == "flex" and like.device.type != "cpu")  # whose C++ template keeps no sums


def refresh_tensors(
    kernel: WindowKernel, *, grid: tuple[int, ...], size: tuple[int, ...], text: tuple[int, int], like: Tensor
) -> tuple[Tensor, ...]:
    """The constants that :func:`refreshed_attention` reads."""
    if kernel in OWN_KERNELS:
        return ()
    return tuple(t for outside in (False, True) for t in block_lists(grid, size, text, like.device, outside=outside))


def _window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    constants: tuple[Tensor, ...],
    grid: tuple[int, ...],
    size: tuple[int, ...],
    text: tuple[int, int],
    scale: float | None,
    kernel: WindowKernel,
) -> Tensor:
    if covers(grid, size):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if kernel == "flex":
        return flex_band(q, k, v, block_mask(grid, size, text, constants), scale)
    flash = flash_window.flash_window if kernel == "flash_attn" else flash_window.torch_flash_window
    return cast(Tensor, flash(q, k, v, size[0], scale).transpose(1, 2))


def covers(grid: tuple[int, ...], size: tuple[int, ...]) -> bool:
    """Whether the window of every token is the whole grid."""
    return all(reach >= length - 1 for length, reach in zip(grid, size, strict=True))


def window_tensors(
    kernel: WindowKernel, *, grid: tuple[int, ...], size: tuple[int, ...], text: tuple[int, int], like: Tensor
) -> tuple[Tensor, ...]:
    """The constants that :func:`window_attention` reads; made once, when a piece is compiled.

    For ``sdpa`` the additive bias of one tile, for ``flex`` four lists of block indices: never anything of size
    N x N.
    """
    if covers(grid, size) or kernel in (*OWN_KERNELS, *FLASH_KERNELS):
        return ()
    if kernel == "flex":
        return block_lists(grid, size, text, like.device)
    return (tile_bias(grid, size, like),)


def prepare(like: Tensor, tokens: int) -> None:
    """Begin, in the background, to build what windows over so many tokens will probably run on."""
    if cpu_window.fits(like, (tokens,)) and _worth_a_kernel(tokens):
        cpu_window.build_in_background()


def _worth_a_kernel(tokens: int) -> bool:
    return tokens >= 512  # from there on the kernel for CPUs was measured faster than tiles


def choose_kernel(
    requested: str,
    *,
    like: Tensor,
    grid: tuple[int, ...],
    size: tuple[int, ...],
    text: tuple[int, int],
    masked: bool,
) -> WindowKernel:
    """The kernel for a site, given the ``window_kernel`` option.

    A model's own mask is honoured by the tiled form alone, which is also what a window over everything takes.

    Raises:
        OptionError: a kernel was asked for where it cannot run, or for a window that it does not have.
    """
    if requested in FLASH_KERNELS:
        _check_flash(requested, like, grid, text)
    if masked or covers(grid, size):
        return "sdpa"
    if requested == "auto":
        return _default(like, grid)
    own = OWN_KERNELS.get(requested)
    if own is not None and not own.serves(like, grid):
        raise OptionError(
            f"our own kernel {requested!r} cannot run here",
            where="options['window_kernel']",
            got=f"{requested!r} for {like.dtype} on {like.device.type}, over {len(grid)} axes",
            allowed=f"a window along one axis, {own.SERVED}",
            todo="leave window_kernel at 'auto'",
        )
    return cast(WindowKernel, requested)


def _check_flash(requested: str, like: Tensor, grid: tuple[int, ...], text: tuple[int, int]) -> None:
    missing = requested == "flash_attn" and flash_window.package() is None
    if missing or not flash_window.fits(like, grid, text):
        plain = len(grid) == 1 and not any(text)
        raise OptionError(
            "FlashAttention cannot run here" + (": flash-attn is not installed" if missing else ""),
            where="options['window_kernel']",
            got=f"{requested!r} for {like.dtype} on {like.device.type}"
            + ("" if plain else ", over a grid or with text"),
            allowed="float16 or bfloat16 on cuda, and a window along one axis without text",
            todo="leave window_kernel at 'auto'",
        )


def _default(like: Tensor, grid: tuple[int, ...]) -> WindowKernel:
    """What ``auto`` stands for.

    Our own kernel, and where it cannot serve, flex on CUDA and the tiled form elsewhere.  On CPU both were measured
    faster than flex's C++ template at 1 024 and 4 096 tokens, and cost nothing to compile.
    """
    if like.device.type == "cuda":
        return "triton" if cuda_window.serves(like, grid) else "flex"
    return "cpp" if _worth_a_kernel(math.prod(grid)) and cpu_window.serves(like, grid) else "sdpa"


def cached_output(state: Tensor) -> Tensor:
    """A site's stored output in place of its attention (DiTFastAttn, section 3.3: AST)."""
    return state


def cfg_half(x: Tensor, *, axis: int, second: bool) -> Tensor:
    """The conditional half of a batch (DiTFastAttn, section 3.4: ASC)."""
    half = x.shape[axis] // 2
    return x.narrow(axis, half if second else 0, half)


def cfg_shared(half: Tensor, *, axis: int) -> Tensor:
    """One half of a batch used for both: computed by index where a compiler fuses it with what reads it."""
    return half.repeat(*(2 if i == axis else 1 for i in range(half.ndim)))


def in_layout(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """``x`` with its axes in memory in the order that ``stride`` has; nothing is copied if it is so already."""
    order = sorted(range(x.ndim), key=lambda axis: (-stride[axis], axis))
    back = [order.index(axis) for axis in range(x.ndim)]
    return x.permute(order).contiguous().permute(back)
