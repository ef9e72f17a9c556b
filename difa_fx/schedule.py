"""What each site reads, writes and drops at each step, known before the first step runs.

A plan is static, so the life of every state tensor is known: an output is stored only if the next step at that
site reads it, a residual only if a window step reads it before the next full one, and both are dropped after
their last reader.  This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from difa_fx.plan import Method, Plan


@dataclass(frozen=True, slots=True)
class SiteAction:
    """What one site computes at one step: with the region's structure, all that its piece depends on.

    Attributes:
        method: the plan's method.
        reads_half: the residual it reads holds the conditional half alone.
        writes_residual: it hands out full minus window attention, for a later window step.
    """

    method: Method
    reads_half: bool = False
    writes_residual: bool = False

    @property
    def reads_residual(self) -> bool:
        """Whether it takes a stored residual."""
        return self.method.windowed

    def __str__(self) -> str:
        half = "/2" if self.reads_half else ""
        return f"{self.method.value}{half}" + ("->r" if self.writes_residual else "")


FULL = SiteAction(Method.FULL)


@dataclass(frozen=True, slots=True)
class SiteStep:
    """One site at one step, as the runner sees it.

    Attributes:
        action: what its piece computes.
        output_half: the output that is current after this step, computed now or stored, is of the conditional
            half alone.
        takes_half: the stored residual is of the whole batch and only its conditional half is read.
        keeps_output: the next step reads this step's output.
        keeps_residual: a later step reads the stored residual.
    """

    action: SiteAction
    output_half: bool = False
    takes_half: bool = False
    keeps_output: bool = False
    keeps_residual: bool = False


@dataclass(frozen=True, slots=True)
class StateShape:
    """Size of one site's state tensors for the whole batch, in bytes."""

    output_bytes: int
    residual_bytes: int


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

    def state_bytes(self, shapes: Mapping[str, StateShape]) -> tuple[int, ...]:
        """Bytes of state held after each step, with each site's sizes from ``shapes``."""
        residual_share = dict.fromkeys(self.sites, 1)
        totals = []
        for row in self.rows:
            total = 0
            for site, entry in zip(self.sites, row, strict=True):
                if entry.action.writes_residual:
                    residual_share[site] = 2 if entry.action.method.shares_cfg else 1
                if entry.keeps_output:
                    total += shapes[site].output_bytes // (2 if entry.output_half else 1)
                if entry.keeps_residual:
                    total += shapes[site].residual_bytes // residual_share[site]
            totals.append(total)
        return tuple(totals)


def make_schedule(plan: Plan, sites: Sequence[str]) -> Schedule:
    """The schedule of ``plan`` for a graph's ``sites``; a site the plan does not name is full."""
    known = {site: index for index, site in enumerate(plan.sites)}
    columns = []
    for site in sites:
        if site in known:
            methods = tuple(row[known[site]] for row in plan.methods)
        else:
            methods = (Method.FULL,) * plan.steps
        columns.append(_column(methods))
    rows = tuple(zip(*columns, strict=True)) if columns else ((),) * plan.steps
    return Schedule(tuple(sites), rows)


def _column(methods: Sequence[Method]) -> tuple[SiteStep, ...]:
    """One site's steps.  The plan was checked: nothing is read that was not written."""
    entries: list[SiteStep] = []
    output_half = residual_half = False
    for step, method in enumerate(methods):
        follows = _window_follows(methods, step)
        takes_half = False
        if method.windowed:
            takes_half = method.shares_cfg and not residual_half
            action = SiteAction(method, reads_half=method.shares_cfg or residual_half)
        elif method.refreshes:
            residual_half = method.shares_cfg
            action = SiteAction(method, writes_residual=follows)
        else:
            action = SiteAction(method)
        if method.computes:
            output_half = method.shares_cfg
        entries.append(
            SiteStep(
                action,
                output_half=output_half,
                takes_half=takes_half,
                keeps_output=_cached_follows(methods, step),
                keeps_residual=follows,
            )
        )
    return tuple(entries)


def _cached_follows(methods: Sequence[Method], step: int) -> bool:
    """Whether the next step reads this one's output."""
    return step + 1 < len(methods) and methods[step + 1] is Method.CACHED


def _window_follows(methods: Sequence[Method], step: int) -> bool:
    """Whether a window step comes after ``step`` and before the next full one."""
    for method in methods[step + 1 :]:
        if method.refreshes:
            return False
        if method in (Method.WINDOW, Method.WINDOW_CFG):
            return True
    return False
