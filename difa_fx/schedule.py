"""What each site reads, writes and drops at each step, known before the first step runs.

A plan is static, so the life of every state tensor is known: an output is stored only if the next step at that
site reads it, a residual only if a window step reads it before the next full one, and both are dropped after
their last reader.  Where the two halves of guidance are calls of their own, each has its state, and the
unconditional call takes from the conditional one what the plan lets them share.  This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from difa_fx.cost import SiteShape
from difa_fx.plan import Method, Plan
from difa_fx.plan_words import window_follows


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

    In a batch of two halves, a state that a ``+cfg`` step made holds the conditional half alone.

    Attributes:
        action: what its piece computes.
        output_half: the output that is current after this step, computed now or stored, is such a half.
        residual_half: the residual that is read or written is such a half.
        keeps_output: the next step reads this step's output.
        keeps_residual: a later step reads the stored residual.
        branch: which of a step's calls it is; each has a state of its own.
        takes: it computes nothing and takes the output that the first call of the step hands over.
        takes_residual: it takes the first call's residual, too.
        hands: it hands its output to the step's second call.
        hands_residual: and its residual.
    """

    action: SiteAction
    output_half: bool = False
    residual_half: bool = False
    keeps_output: bool = False
    keeps_residual: bool = False
    branch: int = 0
    takes: bool = False
    takes_residual: bool = False
    hands: bool = False
    hands_residual: bool = False

    @property
    def runs(self) -> bool:
        """Whether its region is computed."""
        return self.action.method.computes and not self.takes

    def kept_bytes(self, shape: SiteShape) -> int:
        """Bytes of its own state held after it."""
        output = shape.output_numel // (2 if self.output_half else 1) if self.keeps_output else 0
        residual = shape.residual_numel // (2 if self.residual_half else 1) if self.keeps_residual else 0
        return (output + residual) * shape.itemsize

    def handed_bytes(self, shape: SiteShape) -> int:
        """Bytes that wait for the second call."""
        return (shape.output_numel * self.hands + shape.residual_numel * self.hands_residual) * shape.itemsize


@dataclass(frozen=True, slots=True)
class Schedule:
    """Every site's calls: ``rows[call][site]``, sites in the order of ``sites``; a step is one call or two."""

    sites: tuple[str, ...]
    rows: tuple[tuple[SiteStep, ...], ...]
    calls_per_step: int = 1

    @property
    def calls(self) -> int:
        """Number of calls of the denoiser."""
        return len(self.rows)

    def row(self, call: int) -> dict[str, SiteStep]:
        """What each site does at ``call``."""
        return dict(zip(self.sites, self.rows[call], strict=True))

    def state_bytes(self, shapes: Mapping[str, SiteShape]) -> tuple[int, ...]:
        """Bytes of state held after each call, with each site's sizes from ``shapes``."""
        totals = []
        for call, row in enumerate(self.rows):
            recent = self.rows[max(0, call + 1 - self.calls_per_step) : call]
            shown = [pair for r in (*recent, row) for pair in zip(self.sites, r, strict=True)]
            held = [entry.kept_bytes(shapes[site]) for site, entry in shown]
            waits = [entry.handed_bytes(shapes[site]) for site, entry in zip(self.sites, row, strict=True)]
            totals.append(sum(held) + sum(waits))
        return tuple(totals)


def make_schedule(plan: Plan, sites: Sequence[str]) -> Schedule:
    """The schedule of ``plan`` for a graph's ``sites``; a site the plan does not name is full."""
    known = {site: index for index, site in enumerate(plan.sites)}
    columns = []
    for site in sites:
        full = (Method.FULL,) * plan.steps
        methods = tuple(row[known[site]] for row in plan.methods) if site in known else full
        columns.append(column_steps(methods) if plan.calls_per_step == 1 else column_calls(methods))
    count = plan.steps * plan.calls_per_step
    rows = tuple(zip(*columns, strict=True)) if columns else ((),) * count
    return Schedule(tuple(sites), rows, plan.calls_per_step)


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


def column_calls(methods: Sequence[Method]) -> tuple[SiteStep, ...]:
    """One site's calls, two a step, conditional first; ``+cfg`` lets the second take what the first computed."""
    first = column_steps([method.alone for method in methods])
    second = [Method.CACHED if method is Method.WINDOW_CFG else method for method in methods]
    calls: list[SiteStep] = []
    for step, method in enumerate(methods):
        read_later = window_follows(second, step)
        hands_residual = method is Method.FULL_CFG and read_later
        entry = first[step]
        writes = entry.action.writes_residual or hands_residual
        calls.append(
            replace(
                entry,
                action=replace(entry.action, writes_residual=writes),
                hands=method.shares_cfg,
                hands_residual=hands_residual,
            )
        )
        calls.append(
            SiteStep(
                SiteAction(method.alone, writes_residual=method is Method.FULL and read_later),
                keeps_output=_cached_follows(methods, step),
                keeps_residual=read_later,
                branch=1,
                takes=method.shares_cfg,
                takes_residual=hands_residual,
            )
        )
    return tuple(calls)


def open_step(methods: Sequence[Method]) -> tuple[SiteStep, ...]:
    """The last step of a site's ``methods`` so far, when any method may come next: all that it makes is kept."""
    last = column_steps(methods)[-1]
    action = SiteAction(last.action.method, writes_residual=last.action.method.refreshes)
    return (replace(last, action=action, keeps_output=True, keeps_residual=True),)


def open_calls(methods: Sequence[Method]) -> tuple[SiteStep, ...]:
    """The same where a step is two calls, the conditional one first."""
    first, second = column_calls(methods)[-2:]
    method = methods[-1]
    handed = method is Method.FULL_CFG
    kept = {"keeps_output": True, "keeps_residual": True}
    writes = SiteAction(method.alone, writes_residual=method.refreshes)
    alone = SiteAction(method.alone, writes_residual=method is Method.FULL)
    return (
        replace(first, action=writes, hands_residual=handed, **kept),
        replace(second, action=alone, takes_residual=handed, **kept),
    )


def without_residuals(entry: SiteStep) -> SiteStep:
    """``entry`` where no window can ever come: nothing of that kind is made or handed over."""
    action = replace(entry.action, writes_residual=False)
    return replace(entry, action=action, keeps_residual=False, hands_residual=False, takes_residual=False)


def _cached_follows(methods: Sequence[Method], step: int) -> bool:
    """Whether the next step reads this one's output."""
    return step + 1 < len(methods) and methods[step + 1] is Method.CACHED
