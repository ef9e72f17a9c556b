"""Plans to measure by: one in which every method stands once, columns of a given plan, and one made to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from difa_fx.bench.settings import EIGHTH
from difa_fx.bench.subject import Subject, timesteps
from difa_fx.cost import SiteShape, site_flops
from difa_fx.errors import OptionError
from difa_fx.plan import CFGOrder, Method, Plan, Window

REFRESH = "refresh"
REFRESH_CFG = "refresh+cfg"


@dataclass(frozen=True, slots=True)
class MethodPlan:
    """A plan whose rows are uniform.

    Attributes:
        plan: the plan.
        steps: name of what is measured to the step that does it: methods, and ``refresh``, a full step that
            also writes the residual of a later window step.
    """

    plan: Plan
    steps: dict[str, int]


def methods_of(subject: Subject, wanted: Sequence[str]) -> tuple[Method, ...]:
    """Those of ``wanted`` that a subject can do at every site: no ``+cfg`` without guidance; full is always there."""
    possible = [Method(name) for name in wanted if subject.cfg is not None or not Method(name).shares_cfg]
    return tuple(dict.fromkeys([Method.FULL, *possible]))


def method_plan(subject: Subject, methods: Sequence[Method], window: Window) -> MethodPlan:
    """Every method of ``methods`` at all sites of a step of its own, after a step that makes what it reads.

    ::

        full | full | full, refresh | window | full | cached | full | full+cfg | full+cfg, refresh | window+cfg
    """
    rows: list[Method] = [Method.FULL]
    steps: dict[str, int] = {}

    def add(method: Method, name: str | None = None) -> None:
        rows.append(method)
        if name is not None:
            steps[name] = len(rows) - 1

    add(Method.FULL, Method.FULL.value)
    if Method.WINDOW in methods:
        add(Method.FULL, REFRESH)
        add(Method.WINDOW, Method.WINDOW.value)
    if Method.CACHED in methods:
        add(Method.FULL)
        add(Method.CACHED, Method.CACHED.value)
    if Method.FULL_CFG in methods:
        add(Method.FULL)
        add(Method.FULL_CFG, Method.FULL_CFG.value)
    if Method.WINDOW_CFG in methods:
        add(Method.FULL_CFG, REFRESH_CFG)
        add(Method.WINDOW_CFG, Method.WINDOW_CFG.value)
    return MethodPlan(_uniform(subject, rows, window), steps)


def _uniform(subject: Subject, rows: Sequence[Method], window: Window) -> Plan:
    return Plan(
        steps=len(rows),
        sites=subject.sites,
        methods=tuple((method,) * len(subject.sites) for method in rows),
        window=window,
        cfg=subject.cfg,
        timesteps=tuple(subject.shown(t) for t in timesteps(len(rows))),
    )


def fitted_plan(
    plan: Plan, subject: Subject, *, columns: Sequence[int] | None, steps: int | None, window: Window | None
) -> Plan:
    """``plan`` for the subject's sites: columns picked, sites renamed in order, its own order of guidance.

    Args:
        plan: made for any denoiser.
        subject: what it is to run on; without guidance ``+cfg`` methods are taken without it.
        columns: which of the plan's sites, in order; None where it has as many as the subject.
        steps: steps of a generation; None as in the plan.
        window: in place of the plan's own.

    Raises:
        OptionError: there is not one column for each site.
    """
    picked = tuple(range(len(plan.sites))) if columns is None else tuple(columns)
    beyond = [column for column in picked if column not in range(len(plan.sites))]
    if beyond or len(picked) != len(subject.sites):
        raise OptionError(
            "there is not one column of the plan for each site",
            where="--columns",
            got=f"{len(picked)} columns ({', '.join(map(str, picked[:8]))}{', ...' if len(picked) > 8 else ''})",
            allowed=f"{len(subject.sites)} columns, each from 0 to {len(plan.sites) - 1}",
            todo="pick columns with --columns, for instance 4,12,20,27 for four layers",
        )
    source = plan if subject.cfg is not None else plan.without_cfg()
    found = source.replace(
        sites=subject.sites,
        methods=tuple(tuple(row[column] for column in picked) for row in source.methods),
        window=plan.window if window is None else window,
        cfg=subject.cfg,
        denoiser=type(subject.model).__name__,
        timesteps=None,
    )
    count = steps or plan.steps
    return found.for_steps(count, timesteps=tuple(subject.shown(t) for t in timesteps(count)))


def plan_keeping(
    share: float, shape: SiteShape, *, sites: Sequence[str], steps: int, window: Window, cfg: CFGOrder
) -> Plan:
    """A plan in the manner of calibrated ones that keeps ``share`` of the attention's operations, projections counted.

    It is made by a rule and of no use but to be timed: the first step is full; then each site computes everything for
    one half of guidance every fourth (deep ones: every sixth) step, and a window or nothing between.  Windows take the
    place of what is cached, shallow sites and early steps first, until the share is reached.

    Args:
        share: of all operations.
        shape: every site's.
        sites: their paths.
        steps: of a generation.
        window: tokens to either side.
        cfg: the order of guidance.

    Raises:
        OptionError: such plans keep more, or less.
    """
    depth = len(sites)
    rows = [[_by_rule(step, index, depth) for index in range(depth)] for step in range(steps)]
    cells = [(step, index) for step in range(steps) for index in range(depth) if rows[step][index] is Method.CACHED]
    one, goal = site_flops(shape, Method.FULL, window), share * steps * depth
    spent = sum(site_flops(shape, method, window) for row in rows for method in row) / one
    more = site_flops(shape, Method.WINDOW_CFG, window) / one
    count = round((goal - spent) / more)
    if not 0 <= count <= len(cells):
        raise OptionError(
            "no plan of this kind keeps so much",
            where="share",
            got=share,
            allowed=f"{spent / steps / depth:.2f} to {(spent + more * len(cells)) / steps / depth:.2f}",
            todo="ask for another share, or another window",
        )
    for step, index in sorted(cells, key=lambda cell: (cell[0] / steps + cell[1] / depth, cell))[:count]:
        rows[step][index] = Method.WINDOW_CFG
    methods = tuple(tuple(row) for row in rows)
    return Plan(steps=steps, sites=tuple(sites), methods=methods, window=window, cfg=cfg)


def _by_rule(step: int, index: int, depth: int) -> Method:
    third = 3 * index // depth
    since = step % (4 + third)
    if step == 0:
        return Method.FULL
    if since == 0:
        return Method.FULL_CFG
    if since % 2:
        return Method.CACHED
    return Method.WINDOW if third == 0 and step < 4 else Method.WINDOW_CFG


def window_of(asked: str | int | None, subject: Subject) -> int:
    """Tokens to either side: as asked, or an eighth of the image's tokens."""
    assert subject.size.tokens is not None
    if asked is None or asked == EIGHTH:
        return max(subject.size.tokens // 8, 1)
    try:
        window = int(asked)
    except ValueError:
        window = -1
    if window < 0:
        raise OptionError(
            "a window is no number of tokens",
            where="--window",
            got=asked,
            allowed=f"0, 1, 2, ... or {EIGHTH}",
            todo="give tokens to either side",
        )
    return window
