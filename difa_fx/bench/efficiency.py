"""Saving efficiency: how much of what a plan leaves out is saved indeed.

::

    efficiency = (time of full - time of plan) / (time of full - ideal)
    ideal      = time of full - sum over sites of (1 - kept share) * time of the site's attention

The kept share counts a site's operations with its projections (:mod:`difa_fx.cost`), and the time of its attention is
measured apart from difa_fx (:mod:`difa_fx.bench.attention_time`).  The DiTFastAttn paper's own table of single methods
gives 65-96 % at 1 024 tokens and 94-97 % at 4 096 and 16 384.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from difa_fx.cost import SiteShape, site_flops
from difa_fx.plan import Method, Plan, Window


def kept_share(shape: SiteShape, method: Method, window: Window) -> float:
    """The share of a site's operations that ``method`` keeps, projections counted."""
    return site_flops(shape, method, window) / site_flops(shape, Method.FULL, window)


def savable(plan: Plan, steps: Sequence[int], shapes: Mapping[str, SiteShape], seconds: Mapping[str, float]) -> float:
    """Seconds that ``steps`` of ``plan`` save if time went with operations.

    Args:
        plan: the plan.
        steps: which of its steps.
        shapes: sizes of each site, for one call.
        seconds: of each site's attention, for one call.
    """
    saved = sum(
        (1 - kept_share(shapes[site], method, plan.window)) * seconds[site]
        for step in steps
        for site, method in plan.at(step).items()
    )
    return saved * plan.calls_per_step


def efficiencies(full: Sequence[float], own: Sequence[float], saved: Sequence[float]) -> list[float] | None:
    """Saving efficiency of each round; None where there is nothing to save."""
    if not all(value > 0 for value in saved):
        return None
    return [(a - b) / c for a, b, c in zip(full, own, saved, strict=True)]
