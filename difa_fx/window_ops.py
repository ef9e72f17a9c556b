"""Our own kernels for windows along one axis, as operators: two operators, with an implementation for each device.

A window step reads the keys that its queries see and nothing else, and adds the residual on the way out; a step that
refreshes the residual computes attention inside and outside the window side by side, and full attention is the merge
of the two.  :mod:`difa_fx.cpu_window` and :mod:`difa_fx.cuda_window` implement them.

Letters: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from difa_fx.banded import like_attention

_library: Any = torch.library.Library("difa", "FRAGMENT")  # type: ignore[no-untyped-call]
_BAND = "int window, int[] text, float? scale"
_library.define(f"near_window(Tensor q, Tensor k, Tensor v, Tensor? residual, {_BAND}) -> Tensor")
_library.define(f"near_refresh(Tensor q, Tensor k, Tensor v, {_BAND}) -> (Tensor, Tensor)")
torch.library.register_fake("difa::near_window", lambda q, *rest: like_attention(q), lib=_library)
torch.library.register_fake("difa::near_refresh", lambda q, *rest: (like_attention(q), like_attention(q)), lib=_library)

near_window = torch.ops.difa.near_window.default
"""Attention within the window, plus ``residual`` if there is one, [B, N, H, D]; q, k and v are [B, H, N, D]."""

near_refresh = torch.ops.difa.near_refresh.default
"""Full attention, and full minus attention within the window, both [B, N, H, D]."""


class Attend(Protocol):
    """A kernel, as one function: what a window step gives, or the two results of a refreshing step."""

    def __call__(
        self,
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
        """Results are [B, N, H, D] and contiguous; q, k and v are [B, H, N, D], of any strides."""


def implement(key: str, attend: Attend) -> None:
    """Let ``attend`` stand behind both operators for tensors of the dispatch key, such as ``CPU``."""

    def window_step(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        residual: Tensor | None,
        window: int,
        text: Sequence[int],
        scale: float | None,
    ) -> Tensor:
        return attend(q, k, v, residual, window, text, scale, refresh=False)[0]

    def refresh_step(
        q: Tensor, k: Tensor, v: Tensor, window: int, text: Sequence[int], scale: float | None
    ) -> tuple[Tensor, ...]:
        return attend(q, k, v, None, window, text, scale, refresh=True)

    _library.impl("near_window", window_step, key)
    _library.impl("near_refresh", refresh_step, key)
