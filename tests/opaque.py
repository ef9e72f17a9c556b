"""Attention as operators of other libraries, with their names and schemas, computed by SDPA on the CPU.

- ``flash_attn::_flash_attn_forward`` is flash-attn's, 2.7 and 2.8; q, k and v are [B, N, H, d].
- ``xformers_flash::flash_fwd`` is xformers' since 0.0.28; the same layout, which it calls BMHK.
- ``sageattention::sageattn`` stands for SageAttention's function of that name, which is not itself an operator.

Where such a library is installed and imported, its own operator stays and is given a kernel for the CPU.

Letters: B batch, N tokens, H heads, d head width, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _attend(q_BNHd: Tensor, k_BNHd: Tensor, v_BNHd: Tensor, scale: float | None, causal: bool = False) -> Tensor:
    """[B, N, H, d], contiguous as a kernel writes it."""
    q, k, v = (part.transpose(1, 2) for part in (q_BNHd, k_BNHd, v_BNHd))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2).contiguous()


def _sums(q_BNHd: Tensor) -> Tensor:
    """The second result, which no denoiser reads: [B, H, N]."""
    batch, tokens, heads, _ = q_BNHd.shape
    return q_BNHd.new_zeros(batch, heads, tokens, dtype=torch.float32)


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, the logarithms of the sums, the probabilities (none) and the random state."""
    out = _attend(q, k, v, softmax_scale, causal)
    return out, _sums(q), q.new_zeros(0), torch.zeros(2, dtype=torch.int64, device=q.device)


def _flash_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p: float,
    softmax_scale: float,
    is_causal: bool,
    window_left: int,
    window_right: int,
    return_softmax: bool,
    block_tables: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the logarithms of the sums and the random state."""
    out = _attend(query, key, value, softmax_scale, is_causal)
    return out, _sums(query), torch.zeros(2, dtype=torch.int64, device=query.device)


def _sageattn(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str, is_causal: bool, sm_scale: float | None) -> Tensor:
    """Attention on "HND", [B, H, N, d], or "NHD", [B, N, H, d]."""
    if tensor_layout == "NHD":
        return _attend(q, k, v, sm_scale, is_causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=sm_scale).contiguous()


def _define(name: str, function: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
    """Registers ``function``, which itself serves for shapes, or only its kernel where the operator exists."""
    namespace, operator = name.split("::")
    if hasattr(getattr(torch.ops, namespace), operator):
        torch.library.register_kernel(name, "cpu", function)
        return
    torch.library.custom_op(name, function, mutates_args=())
    torch.library.register_fake(name, function)


_define("flash_attn::_flash_attn_forward", _flash_attn_forward)
_define("xformers_flash::flash_fwd", _flash_fwd)
_define("sageattention::sageattn", _sageattn)


class OpaqueAttention(nn.Module):
    """Self-attention [B, N, D] -> [B, N, D] by such an operator.

    Args:
        width: D.
        heads: H.
        tokens: N, unused.
        kind: "flash", "xformers", "sage_hnd", "sage_nhd", or "sdpa" to compare with.
    """

    def __init__(self, width: int, heads: int, tokens: int, *, kind: str) -> None:
        super().__init__()
        self.heads, self.kind, self.scale = heads, kind, (width // heads) ** -0.5
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_BND: Tensor) -> Tensor:
        q, k, v = (to(x_BND).unflatten(-1, (self.heads, -1)) for to in (self.to_q, self.to_k, self.to_v))
        return self.to_out(self.attend(q, k, v).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """From and to [B, N, H, d]."""
        tokens = q.shape[1]
        if self.kind == "flash":
            settings = (0.0, self.scale, False, -1, -1, 0.0, None, False)
            out, _, _, _ = torch.ops.flash_attn._flash_attn_forward(q, k, v, *settings)
            return out
        if self.kind == "xformers":
            settings = (None, None, None, tokens, tokens, 0.0, self.scale, False, -1, -1, False, None)
            out, _, _ = torch.ops.xformers_flash.flash_fwd(q, k, v, *settings)
            return out
        if self.kind == "sage_nhd":
            return torch.ops.sageattention.sageattn(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=self.scale)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if self.kind == "sage_hnd":
            out = torch.ops.sageattention.sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2)
