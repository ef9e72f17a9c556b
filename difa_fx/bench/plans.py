"""Plans to measure by: one in which every method stands once, and columns of a given plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from difa_fx.bench.settings import EIGHTH
from difa_fx.bench.subject import Subject, timesteps
from difa_fx.errors import OptionError
from difa_fx.plan import Method, Plan, Window

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
