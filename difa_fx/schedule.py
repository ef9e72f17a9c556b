"""What each site reads, writes and drops at each step, known before the first step runs.

A plan is static, so the life of every state tensor is known: an output is stored only if the next step at that
site reads it, a residual only if a window step reads it before the next full one, and both are dropped after
their last reader.  This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from difa_fx.cost import SiteShape
from difa_fx.plan import Method, Plan
from difa_fx.plan_rules import window_follows


@dataclass(frozen=True, slots=True)
class SiteAction:
    """What one site computes at one step: with the region's structure, all that its piece depends on.

    Attributes:
        method: the plan's method.
        writes_residual: it hands out full minus window attention, for a later window step.
    """

    method: Method
    writes_residual: bool = False

    def __str__(self) -> str:
        return self.method.value + ("->r" if self.writes_residual else "")


FULL = SiteAction(Method.FULL)


@dataclass(frozen=True, slots=True)
class SiteStep:
    """One site at one step, as the runner sees it.

    A state that a ``+cfg`` step made holds the conditional half alone.

    Attributes:
        action: what its piece computes.
        output_half: the output that is current after this step, computed now or stored, is such a half.
        residual_half: the residual that is read or written is such a half.
        keeps_output: the next step reads this step's output.
        keeps_residual: a later step reads the stored residual.
    """

    action: SiteAction
    output_half: bool = False
    residual_half: bool = False
    keeps_output: bool = False
    keeps_residual: bool = False


@dataclass(frozen=True, slots=True)
class Schedule:
    """Every site's steps: ``rows[step][site]``, sites in the order of ``sites``."""

    sites: tuple[str, ...]
    rows: tuple[tuple[SiteStep, ...], ...]

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.rows)

    def row(self, step: int) -> dict[str, SiteStep]:
        """What each site does at ``step``."""
        return dict(zip(self.sites, self.rows[step], strict=True))

    def state_bytes(self, shapes: Mapping[str, SiteShape]) -> tuple[int, ...]:
        """Bytes of state held after each step, with each site's sizes from ``shapes``."""
        totals = []
        for row in self.rows:
            total = 0
            for site, entry in zip(self.sites, row, strict=True):
                shape = shapes[site]
                if entry.keeps_output:
                    total += shape.output_numel * shape.itemsize // (2 if entry.output_half else 1)
                if entry.keeps_residual:
                    total += shape.residual_numel * shape.itemsize // (2 if entry.residual_half else 1)
            totals.append(total)
        return tuple(totals)


def make_schedule(plan: Plan, sites: Sequence[str]) -> Schedule:
    """The schedule of ``plan`` for a graph's ``sites``; a site the plan does not name is full."""
    known = {site: index for index, site in enumerate(plan.sites)}
    columns = []
    for site in sites:
        full = (Method.FULL,) * plan.steps
        methods = tuple(row[known[site]] for row in plan.methods) if site in known else full
        columns.append(column_steps(methods))
    rows = tuple(zip(*columns, strict=True)) if columns else ((),) * plan.steps
    return Schedule(tuple(sites), rows)


def column_steps(methods: Sequence[Method]) -> tuple[SiteStep, ...]:
    """One site's steps.  The plan was checked: nothing is read that was not written."""
    entries: list[SiteStep] = []
    output_half = residual_half = False
    for step, method in enumerate(methods):
        follows = window_follows(methods, step)
        if method.refreshes:
            residual_half = method.shares_cfg
        if method.computes:
            output_half = method.shares_cfg
        entries.append(
            SiteStep(
                SiteAction(method, writes_residual=method.refreshes and follows),
                output_half=output_half,
                residual_half=residual_half,
                keeps_output=_cached_follows(methods, step),
                keeps_residual=follows,
            )
        )
    return tuple(entries)


def open_step(methods: Sequence[Method]) -> SiteStep:
    """The last step of a site's ``methods`` so far, when any method may come next: all that it makes is kept."""
    last = column_steps(methods)[-1]
    action = SiteAction(last.action.method, writes_residual=last.action.method.refreshes)
    return replace(last, action=action, keeps_output=True, keeps_residual=True)


def _cached_follows(methods: Sequence[Method], step: int) -> bool:
    """Whether the next step reads this one's output."""
    return step + 1 < len(methods) and methods[step + 1] is Method.CACHED
