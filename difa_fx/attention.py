"""The functions that stand in rewritten graphs: window attention, cached output, CFG halves.

A rewrite puts them in as ``call_function`` targets, so a printed graph shows them by name; the compiler traces
through them.  All are pure, keep dtype and device, and never make an N x N tensor.

Letters: B batch, H heads, N tokens, D head width, S block of queries, w window, L = S + 2 w keys of a block.
"""

from __future__ import annotations

import math
from typing import Final, Literal, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from difa_fx._torch import flex_band
from difa_fx.errors import OptionError

WindowKernel = Literal["flex", "flash", "sdpa"]
WINDOW_KERNELS: Final = ("auto", "flex", "flash", "sdpa")

_MIN_BLOCK: Final = 64
_MAX_MASKED_BLOCKS: Final = 16


def window_attention(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    mask: Tensor | None,
    *band: Tensor,
    window: int,
    scale: float | None = None,
    kernel: WindowKernel = "sdpa",
) -> Tensor:
    """Attention of each token to the tokens at most ``window`` away (DiTFastAttn, section 3.2: WA).

    Args:
        mask: the model's own mask, bool or additive, that broadcasts to [B, H, N, N]; ``sdpa`` only.
        band: what :func:`band_tensors` made for this kernel, number of tokens and window.
        window: tokens to either side, over the flattened sequence.
        scale: of the scores; 1 / sqrt(D) when None.
        kernel: which implementation; :func:`choose_kernel` picks one.

    Returns:
        [B, H, N, D], in the layout scaled_dot_product_attention gives.
    """
    tokens = q_BHND.shape[2]
    if window >= tokens - 1:
        return scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=mask, scale=scale)
    if kernel == "flex":
        return flex_band(q_BHND, k_BHND, v_BHND, _block_mask(tokens, window, band), scale)
    if kernel == "flash":
        return _flash_band(q_BHND, k_BHND, v_BHND, window, scale)
    return _sdpa_band(q_BHND, k_BHND, v_BHND, mask, band[0], window, scale)


def band_tensors(kernel: WindowKernel, *, tokens: int, window: int, masked: bool, like: Tensor) -> tuple[Tensor, ...]:
    """The constants that :func:`window_attention` reads; made once, when a piece is compiled.

    For ``sdpa`` an additive band of at most 2 blocks x 4 blocks, for ``flex`` four lists of block indices: never
    anything of size N x N.
    """
    if window >= tokens - 1 or kernel == "flash":
        return ()
    if kernel == "flex":
        return _block_lists(tokens, window, like.device)
    block = _block(tokens, window, masked)
    rows = min(tokens, 2 * block)
    row = torch.arange(rows, device=like.device)[:, None]
    column = torch.arange(rows + 2 * window, device=like.device)[None] - window
    outside = torch.tensor(-math.inf, dtype=like.dtype, device=like.device)
    inside = torch.zeros((), dtype=like.dtype, device=like.device)
    return (torch.where((row - column).abs() <= window, inside, outside),)


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


def _block(tokens: int, window: int, masked: bool) -> int:
    """Queries that the banded form takes at a time."""
    block = max(window, _MIN_BLOCK)
    return max(block, -(-tokens // _MAX_MASKED_BLOCKS)) if masked else block


def _sdpa_band(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    band: Tensor,
    window: int,
    scale: float | None,
) -> Tensor:
    """Banded attention as SDPA over overlapping slices of the keys; the slices are views, not copies.

    Queries go in blocks of S.  Inner blocks see S + 2 w keys and share one [S, L] mask, so they run as one call
    with the blocks in the place of the heads; the two ends, where the band leaves the sequence, run apart.
    """
    batch, heads, tokens, width = q.shape
    block = _block(tokens, window, mask is not None)

    def edge(start: int, stop: int) -> Tensor:
        return _edge(q, k, v, mask, band, start, stop, window, scale)

    inner = (tokens - window) // block - 1
    if mask is not None or inner < 1:
        return _joined([edge(s, min(s + block, tokens)) for s in range(0, tokens, block)])
    stop = (inner + 1) * block
    span = block + 2 * window

    def windows(t: Tensor) -> Tensor:
        cut = t[:, :, block - window : stop + window]
        return cut.unfold(2, span, block).transpose(-1, -2).flatten(0, 1)

    middle = scaled_dot_product_attention(
        q[:, :, block:stop].reshape(batch * heads, inner, block, width),
        windows(k),
        windows(v),
        attn_mask=band[:block, :span],
        scale=scale,
    )
    middle = middle.reshape(batch, heads, inner * block, width)
    return _joined([edge(0, block), middle, edge(stop, tokens)])


def _edge(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    band: Tensor,
    start: int,
    stop: int,
    window: int,
    scale: float | None,
) -> Tensor:
    """Queries ``start`` to ``stop`` against the keys their windows reach."""
    low, high = max(0, start - window), min(q.shape[2], stop + window)
    keep = band[: stop - start, low - start + window : high - start + window]
    if mask is not None:
        part = _cut(_cut(mask, -2, start, stop), -1, low, high)
        keep = torch.where(part, keep, -math.inf) if part.dtype == torch.bool else part + keep
    return scaled_dot_product_attention(
        q[:, :, start:stop], k[:, :, low:high], v[:, :, low:high], attn_mask=keep, scale=scale
    )


def _cut(mask: Tensor, axis: int, start: int, stop: int) -> Tensor:
    return mask if mask.shape[axis] == 1 else mask.narrow(axis, start, stop - start)


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts of the sequence in the layout SDPA gives: [B, N, H, D] in memory."""
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def residual(full_BHND: Tensor, window_BHND: Tensor) -> Tensor:
    """What window attention misses, [B, N, H, D]: stored at a full step, added at window steps."""
    return (full_BHND - window_BHND).transpose(1, 2).contiguous()


def add_residual(window_BHND: Tensor, residual_BNHD: Tensor) -> Tensor:
    """Window attention plus the stored residual, [B, H, N, D] (DiTFastAttn, section 3.2: WA-RS)."""
    return window_BHND + residual_BNHD.transpose(1, 2)


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
