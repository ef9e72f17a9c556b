"""The kernel for CUDA in Triton's interpreter, case by case, beside attention written out in float64.

    TRITON_INTERPRET=1 python interpreted_windows.py CASES

Triton reads the variable when it is imported, so this has a process of its own.  CASES is JSON, a list of settings of
:class:`Case`; what is printed is JSON, too: for each case the largest error of each result, over the largest value.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import dataclass

import torch
from oracle import dense_attention
from torch import Tensor

from difa_fx.cuda_window import attend as attend_window


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call of each operator; ``layout`` is how q, k and v lie in memory, ``maps`` how tiles are loaded."""

    image: int
    window: int
    text: tuple[int, int] = (0, 0)
    width: int = 16
    batch: int = 1
    layout: str = "transposed"
    dtype: str = "float32"
    scale: float | None = None
    loud: float = 1.0
    residual: bool = True
    maps: bool = True


def tensors(case: Case) -> tuple[Tensor, ...]:
    """Queries, keys and values, [B, H, N, D]."""
    generator = torch.Generator().manual_seed(case.image)
    batch, tokens, heads, width = case.batch, case.image + sum(case.text), 2, case.width
    values_3BNHD = torch.randn(3, batch, tokens, heads, width, generator=generator)
    values_3BNHD[:2] *= case.loud
    values_3BHND = values_3BNHD.to(getattr(torch, case.dtype)).transpose(2, 3)
    if case.layout == "packed":
        packed_BNHK = torch.cat(tuple(values_3BHND), -1).transpose(1, 2).contiguous()
        return packed_BNHK.transpose(1, 2).split(width, -1)
    if case.layout == "shared":
        q, k, v = values_3BHND
        return q, k[:, :1].expand(-1, heads, -1, -1), v
    if case.layout == "columns":
        return tuple(values_3BHND.transpose(3, 4).contiguous().transpose(3, 4))
    return tuple(values_3BHND.contiguous() if case.layout == "contiguous" else values_3BHND)


def errors(case: Case) -> dict[str, float]:
    """How far each result is from attention written out, over its largest value; and a refresh from itself."""
    q, k, v = tensors(case)
    text, scale = list(case.text), case.scale
    exact = [t.double() for t in (q, k, v)]
    windowed, expected = (
        dense_attention(*exact, scale=scale, window=window, text=case.text).transpose(1, 2)
        for window in (case.window, None)
    )
    attend = functools.partial(attend_window, maps=case.maps)
    stored = torch.randn(windowed.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
    (near,) = attend(q, k, v, stored if case.residual else None, case.window, text, scale, refresh=False)
    full, missed = attend(q, k, v, None, case.window, text, scale, refresh=True)
    (again,) = attend(q, k, v, missed, case.window, text, scale, refresh=False)
    assert all(t.is_contiguous() and t.dtype == q.dtype for t in (near, full, missed, again))
    outside = (expected - windowed).abs().amax().item()
    pairs = {
        "window": (near, windowed + stored.double() if case.residual else windowed),
        "full": (full, expected),
        "missed": (missed, expected - windowed),
        "again": (again, full),
    }
    found = {name: ((got - want).abs().amax() / expected.abs().amax()).item() for name, (got, want) in pairs.items()}
    if outside == 0:
        found["not zero"] = float(missed.count_nonzero())
    return found


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    cases = [Case(**{**settings, "text": tuple(settings.get("text", (0, 0)))}) for settings in json.loads(sys.argv[1])]
    sys.stdout.write(json.dumps([errors(case) for case in cases]))
