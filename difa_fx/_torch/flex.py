"""flex_attention as the operator that Inductor lowers."""

from __future__ import annotations

from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention as flex_attention_hop
from torch.nn.attention.flex_attention import BlockMask, _apply_kernel_options, _identity


def flex_band(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float | None) -> Tensor:
    """flex_attention as the operator Inductor lowers, without Dynamo.  Tensors are [B, H, N, D]."""
    return _flex(q, k, v, block_mask, scale, lse=False)[0]


def flex_with_lse(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float | None) -> tuple[Tensor, Tensor]:
    """The same with the binary logarithm of each query's sum of exponentials, [B, H, N]; not on CPU.

    A query that sees no key gets zeros, and minus infinity.
    """
    return _flex(q, k, v, block_mask, scale, lse=True)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float | None, *, lse: bool
) -> tuple[Tensor, Tensor]:
    """Calls the higher-order operator with the options the public function would give it.

    The public function would start a compilation of its own.
    """
    options = _apply_kernel_options(q, k, v, lse, {})
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.device.type == "cpu":
        # The C++ template reads the sizes of q's and k's buffers, so they must be no views of a projection's.
        q, k, scale = q * scale**0.5, k * scale**0.5, 1.0
    out, log_sum, *_ = flex_attention_hop(q, k, v, _identity, block_mask.as_tuple(), scale, dict(options))
    return out, log_sum
