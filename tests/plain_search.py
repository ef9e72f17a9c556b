"""The paper's search, spelled out: the whole denoiser runs, eagerly, for every candidate.

DiTFastAttn (arXiv 2406.08552), Algorithm 1.  Built on the eager oracle; the package is never asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from oracle import Call, Oracle
from torch import Tensor, nn

PAPER = ("cached", "window+cfg", "window", "full+cfg")


def plain_search(
    model: nn.Module,
    calls: Sequence[Call],
    sites: Sequence[str],
    *,
    threshold: float,
    loss: Callable[[Tensor, Tensor], Tensor],
    window: int,
    cfg: str | None,
    tensor_of: Callable[[Any], Tensor],
    candidates: Sequence[str] = PAPER,
    text: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[list[list[str]], list[list[dict[str, float]]], int]:
    """The plan's rows, the losses tried, and how many whole calls of the denoiser that took.

    ``calls`` are a generation's calls, drawn beforehand: they do not depend on the denoiser's outputs.
    """
    rows: list[list[str]] = []
    losses: list[list[dict[str, float]]] = []
    plan = SimpleNamespace(sites=sites, methods=rows, window=window, cfg=cfg)
    oracle = Oracle(model, plan, text)
    count = 0

    def run(row: list[str]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The output under ``row`` at this step, and the state it leaves; the oracle's own stays."""
        nonlocal count
        count += 1
        before = dict(oracle.outputs), dict(oracle.residuals)
        rows.append(row)
        args, kwargs = calls[len(rows) - 1]
        output = tensor_of(oracle(len(rows) - 1, *args, **kwargs)).clone()
        rows.pop()
        after = dict(oracle.outputs), dict(oracle.residuals)
        oracle.outputs, oracle.residuals = before
        return output, *after

    for step in range(len(calls)):
        row = ["full"] * len(sites)
        tried: list[dict[str, float]] = [{} for _ in sites]
        for i in range(len(sites)) if step else ():
            full, *_ = run([*row[:i], *["full"] * (len(sites) - i)])
            for method in candidates:
                output, *_ = run([*row[:i], method, *["full"] * (len(sites) - i - 1)])
                tried[i][method] = float(loss(full, output))
                if tried[i][method] < (i + 1) / len(sites) * threshold:
                    row[i] = method
                    break
        _, oracle.outputs, oracle.residuals = run(row)
        rows.append(row)
        losses.append(tried)
    return rows, losses, count
