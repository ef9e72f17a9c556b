"""The functions that stand in rewritten graphs: window attention, cached output, CFG halves.

A rewrite puts them in as ``call_function`` targets, so a printed graph shows them by name; the compiler traces
through them.  All are pure, keep dtype and device, and never make an N x N tensor.

Letters: B batch, H heads, N tokens, D head width, S block of queries, L keys of a block.
"""

from __future__ import annotations

from typing import Final, Literal, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from difa_fx._torch import flex_band
from difa_fx.banded import band, band_attention, band_residual
from difa_fx.errors import OptionError

WindowKernel = Literal["flex", "flash", "sdpa"]
WINDOW_KERNELS: Final = ("auto", "flex", "flash", "sdpa")


def window_attention(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    mask: Tensor | None,
    *band: Tensor,
    window: int,
    residual_BNHD: Tensor | None = None,
    scale: float | None = None,
    kernel: WindowKernel = "sdpa",
) -> Tensor:
    """Attention of each token to the tokens at most ``window`` away, plus the stored residual.

    DiTFastAttn, section 3.2: WA, and with a residual WA-RS.

    Args:
        mask: the model's own mask, bool or additive, that broadcasts to [B, H, N, N]; ``sdpa`` only.
        band: what :func:`band_tensors` made for this kernel, number of tokens and window.
        window: tokens to either side, over the flattened sequence.
        residual_BNHD: what :func:`window_residual` gave at a full step.
        scale: of the scores; 1 / sqrt(D) when None.
        kernel: which implementation; :func:`choose_kernel` picks one.

    Returns:
        [B, H, N, D], in the layout scaled_dot_product_attention gives.
    """
    if kernel == "sdpa" and band:
        out_BNHD = band_attention(q_BHND, k_BHND, v_BHND, mask, residual_BNHD, band[0], window, scale)
        return cast(Tensor, out_BNHD.transpose(1, 2))
    out_BHND = _window(q_BHND, k_BHND, v_BHND, mask, band, window, scale, kernel)
    return out_BHND if residual_BNHD is None else out_BHND + residual_BNHD.transpose(1, 2)


def window_residual(
    full_BHND: Tensor,
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    mask: Tensor | None,
    *band: Tensor,
    window: int,
    scale: float | None = None,
    kernel: WindowKernel = "sdpa",
) -> Tensor:
    """What window attention misses of full attention, [B, N, H, D]: stored at a full step, added at window steps."""
    full_BNHD = full_BHND.transpose(1, 2)
    if kernel == "sdpa" and band:
        return cast(Tensor, band_residual(full_BNHD, q_BHND, k_BHND, v_BHND, mask, band[0], window, scale))
    out_BHND = _window(q_BHND, k_BHND, v_BHND, mask, band, window, scale, kernel)
    return (full_BNHD - out_BHND.transpose(1, 2)).contiguous()


def _window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    band: tuple[Tensor, ...],
    window: int,
    scale: float | None,
    kernel: WindowKernel,
) -> Tensor:
    tokens = q.shape[2]
    if window >= tokens - 1:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if kernel == "flex":
        return flex_band(q, k, v, _block_mask(tokens, window, band), scale)
    return _flash_band(q, k, v, window, scale)


def band_tensors(kernel: WindowKernel, *, tokens: int, window: int, like: Tensor) -> tuple[Tensor, ...]:
    """The constants that :func:`window_attention` reads; made once, when a piece is compiled.

    For ``sdpa`` the additive band of one block, [S, L], for ``flex`` four lists of block indices: never
    anything of size N x N.
    """
    if window >= tokens - 1 or kernel == "flash":
        return ()
    if kernel == "flex":
        return _block_lists(tokens, window, like.device)
    return (band(tokens, window, like),)


def choose_kernel(requested: str, *, like: Tensor, tokens: int, window: int, masked: bool) -> WindowKernel:
    """The kernel for a site, given the ``window_kernel`` option.

    On CPU the banded form is the default: it was measured faster than flex's C++ template at 1 024 and 4 096
    tokens, and it compiles faster.  A model's own mask is honoured by the banded form alone.

    Raises:
        OptionError: FlashAttention was asked for where there is none.
    """
    half = like.dtype in (torch.float16, torch.bfloat16)
    if requested == "flash" and not (half and like.device.type == "cuda"):
        raise OptionError(
            "FlashAttention cannot run here",
            where="options['window_kernel']",
            got=f"'flash' for {like.dtype} on {like.device.type}",
            allowed="float16 or bfloat16 on cuda",
            todo="leave window_kernel at 'auto'",
        )
    if masked or window >= tokens - 1:
        return "sdpa"
    if requested == "auto":
        return "flex" if like.device.type == "cuda" else "sdpa"
    return cast(WindowKernel, requested)


def _block_lists(tokens: int, window: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The band |i - j| <= window as flex_attention's block lists, in closed form: O(N / block) numbers a row.

    Key blocks that the band cuts are listed as partial, those that lie in it for every query of a block as full:
    (partial count, partial indices, full count, full indices).
    """
    size = _flex_block(device)
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
    return tuple(  # type: ignore[return-value]
        t.to(torch.int32)[None, None] for t in (left + right, part_index, full, full_index)
    )


def _block_mask(tokens: int, window: int, lists: tuple[Tensor, ...]) -> BlockMask:
    def in_band(b: Tensor, h: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
        return (q_index - kv_index).abs() <= window

    partial_count, partial_index, full_count, full_index = lists
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_index,
        full_count,
        full_index,
        BLOCK_SIZE=_flex_block(lists[0].device),
        mask_mod=in_band,
        seq_lengths=(tokens, tokens),
        compute_q_blocks=False,
    )


def _flex_block(device: torch.device) -> int:
    return 64 if device.type == "cpu" else 128


def _flash_band(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    """FlashAttention's own window, through torch (no flash-attn package); CUDA, fp16 or bf16."""
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, tokens, width = q.shape
    packed_q, packed_k, packed_v = (t.transpose(1, 2).reshape(batch * tokens, heads, width) for t in (q, k, v))
    ends = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=q.device)
    out = varlen_attn(
        packed_q, packed_k, packed_v, ends, ends, tokens, tokens, scale=scale, window_size=(window, window)
    )
    return cast(Tensor, out).view(batch, tokens, heads, width).transpose(1, 2)


def cached_output(state: Tensor) -> Tensor:
    """A site's stored output in place of its attention (DiTFastAttn, section 3.3: AST)."""
    return state


def cfg_half(x: Tensor, *, axis: int, second: bool) -> Tensor:
    """The conditional half of a batch (DiTFastAttn, section 3.4: ASC)."""
    half = x.shape[axis] // 2
    return x.narrow(axis, half if second else 0, half)


def cfg_shared(half: Tensor, *, axis: int) -> Tensor:
    """One half of a batch used for both."""
    return torch.cat((half, half), axis)


def in_layout(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """``x`` with its axes in memory in the order that ``stride`` has; nothing is copied if it is so already."""
    order = sorted(range(x.ndim), key=lambda axis: (-stride[axis], axis))
    back = [order.index(axis) for axis in range(x.ndim)]
    return x.permute(order).contiguous().permute(back)
