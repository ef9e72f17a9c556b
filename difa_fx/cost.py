"""What attention costs under a plan, in floating-point operations.

Counted as the DiTFastAttn paper (arXiv 2406.08552) counts: the two matrix products of attention,
and, if asked for, the four projections.  One multiply-add is 2 operations; softmax, norms and
rotary embeddings are left out.  With projections and a window of tokens/8 to *either* side,
:func:`site_flops` gives the paper's table of single methods within one point.

Letters: B batch, H heads, N query tokens, M key tokens, D head dim, w window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from difa_fx.errors import SiteError
from difa_fx.plan import Method, Plan, Window
from difa_fx.plan_words import window_follows

__all__ = [
    "SiteShape",
    "attention_flops",
    "kept",
    "kept_per_step",
    "projection_flops",
    "residual_writes",
    "site_flops",
    "window_pairs",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteShape:
    """The sizes of one site, for the whole batch.

    Attributes:
        batch: B, both CFG halves together.
        heads: H.
        tokens: N, the queries.
        head_dim: D.
        kv_tokens: M, the keys; 0 stands for as many as queries.
        text_tokens: how many of the tokens are text, which a window never cuts.
        projection_flops: operations of the site's projections, such as :func:`projection_flops`.
        output_numel: numbers in the site's output; 0 stands for B N H D.
        residual_numel: numbers in the site's residual; 0 stands for B N H D.
        itemsize: bytes per number.
    """

    batch: int
    heads: int
    tokens: int
    head_dim: int
    kv_tokens: int = 0
    text_tokens: int = 0
    projection_flops: int = 0
    output_numel: int = 0
    residual_numel: int = 0
    itemsize: int = 4

    def __post_init__(self) -> None:
        least = {"batch": 1, "heads": 1, "tokens": 1, "head_dim": 1, "itemsize": 1}
        for item in fields(self):
            value = getattr(self, item.name)
            if value < least.get(item.name, 0):
                raise SiteError(
                    "a size of a site is too small",
                    where=f"SiteShape.{item.name}",
                    got=value,
                    allowed=f"{least.get(item.name, 0)} or more",
                    todo="give the sizes of the traced attention",
                )
        numel = self.batch * self.heads * self.tokens * self.head_dim
        object.__setattr__(self, "kv_tokens", self.kv_tokens or self.tokens)
        object.__setattr__(self, "output_numel", self.output_numel or numel)
        object.__setattr__(self, "residual_numel", self.residual_numel or numel)


def window_pairs(tokens: int, window: Window) -> int:
    """How many (query, key) pairs of ``tokens`` x ``tokens`` lie at most ``window`` apart.

    Exact: N (2w + 1) pairs, less w (w + 1) / 2 that would stick out at either end; over a grid, where the axes are
    independent, the product of each axis's.
    """
    if isinstance(window, int):
        reach = min(window, tokens - 1)
        return tokens * (2 * reach + 1) - reach * (reach + 1)
    if math.prod(window.grid) != tokens:
        raise SiteError(
            "the window's grid has another number of tokens than the site",
            got=f"{tokens} tokens",
            allowed=f"{' x '.join(map(str, window.grid))} = {math.prod(window.grid)}",
            todo="give this site full or cached, or the plan the denoiser's own grid",
        )
    return math.prod(window_pairs(size, reach) for size, reach in zip(window.grid, window.size, strict=True))


def projection_flops(batch: int, tokens: int, width: int) -> int:
    """Operations of four square projections (query, key, value, output) for the whole batch."""
    return 8 * batch * tokens * width * width


def attention_flops(shape: SiteShape, method: Method, window: Window, *, refresh: bool = False) -> int:
    """Operations of attention's two matrix products: 4 D per pair, head and batch element.

    Args:
        shape: the site's sizes.
        method: what it does at the step.
        window: tokens to either side of a query.
        refresh: count the window that a refreshing step computes beside full attention to get its
            residual.  The paper leaves it out, and where both come out of one pass there is none.

    Raises:
        SiteError: a window where keys and queries are not equally many.
    """
    if not method.computes:
        return 0
    full = shape.tokens * shape.kv_tokens
    band = _band(shape, window) if method.windowed or refresh else 0
    pairs = band if method.windowed else full + band
    total = 4 * pairs * shape.head_dim * shape.heads * shape.batch
    return total // 2 if method.shares_cfg else total


def site_flops(shape: SiteShape, method: Method, window: Window, *, refresh: bool = False) -> int:
    """Operations of a site's attention and projections; see :func:`attention_flops`."""
    if not method.computes:
        return 0
    projections = shape.projection_flops // 2 if method.shares_cfg else shape.projection_flops
    return projections + attention_flops(shape, method, window, refresh=refresh)


def kept(plan: Plan, shapes: Mapping[str, SiteShape], projections: bool, *, refresh: bool = False) -> float:
    """The fraction of the all-``full`` plan's operations that ``plan`` keeps, over all its steps.

    Args:
        plan: the plan.
        shapes: the sizes of every site; those that the plan does not mention count as ``full``.
        projections: count the projections too.
        refresh: count what residuals cost, at the steps where a later window reads them.

    Raises:
        PlanError: a site of the plan has no sizes.
    """
    parts = kept_per_step(plan, shapes, projections, refresh=refresh)
    return sum(parts) / len(parts)


def kept_per_step(
    plan: Plan, shapes: Mapping[str, SiteShape], projections: bool, *, refresh: bool = False
) -> tuple[float, ...]:
    """As :func:`kept`, for each step by itself."""
    plan.check_sites(list(shapes))
    count = site_flops if projections else attention_flops
    full = sum(count(shape, Method.FULL, plan.window) for shape in shapes.values())
    writes = residual_writes(plan) if refresh else frozenset()

    def spent(step: int) -> int:
        methods = plan.at(step)
        return sum(
            count(
                shape,
                methods.get(site, Method.FULL),
                plan.window,
                refresh=(step, site) in writes,
            )
            for site, shape in shapes.items()
        )

    return tuple(spent(step) / full for step in range(plan.steps))


def residual_writes(plan: Plan) -> frozenset[tuple[int, str]]:
    """The (step, site) pairs that must write a residual: a window reads it before the next one."""
    columns = {site: plan.column(site) for site in plan.sites}
    return frozenset(
        (step, site)
        for site, methods in columns.items()
        for step, method in enumerate(methods)
        if method.refreshes and window_follows(methods, step)
    )


def _band(shape: SiteShape, window: Window) -> int:
    if shape.tokens != shape.kv_tokens:
        raise SiteError(
            "a window needs as many keys as queries",
            got=f"{shape.tokens} queries, {shape.kv_tokens} keys",
            allowed="equal numbers, as in self-attention",
            todo="plan full or cached for this site",
        )
    text, image = shape.text_tokens, shape.tokens - shape.text_tokens
    return window_pairs(image, window) + 2 * text * image + text * text
