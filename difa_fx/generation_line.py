"""One caller's line of generations: what a call tells, whose it may be, and the errors where that cannot be told."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from difa_fx.clock import ATTACH, Clock, Grid, exact
from difa_fx.errors import ClockError
from difa_fx.witness import Seen, Verdict


@dataclass(frozen=True, slots=True)
class Told:
    """What a call tells of itself.

    Attributes:
        timestep: value of the graph's timestep input; None when it has none.
        grid: of its dtype.
        seen: its other inputs.
    """

    timestep: float | None
    grid: Grid = exact
    seen: Callable[[], Seen] = Seen


@dataclass(slots=True, eq=False)
class Line:
    """What one caller runs: generations of attached pipelines, or one and those that it cut short.

    Attributes:
        clocks: the latest last.
        cut: generations that another one followed before their end; their state is gone.
    """

    clocks: list[Clock] = field(default_factory=list)
    cut: list[Clock] = field(default_factory=list)


def waits(line: Line) -> bool:
    """Whether a generation was announced in this thread that has not begun."""
    return any(clock.scheduler is not None and clock.position < 0 for clock in line.clocks)


def untold(told: Told, clock: Clock, reason: str) -> ClockError:
    """The error for a call of which it is not known whose it is; ``reason``: why."""
    return ClockError(
        f"whose generation this call belongs to cannot be told: {reason}",
        where=f"step clock, after {clock.place()}",
        got=f"timestep {told.timestep:g}",
        allowed="calls that timesteps or inputs prove to belong to one generation",
        todo=ATTACH + "; give the plan its 'timesteps'",
    )


def overtaken(told: Told, clock: Clock) -> ClockError:
    """The error for a call of a generation that another one has followed."""
    return ClockError(
        "this call goes on with a generation after which another one began",
        where=f"step clock, after {clock.place()}",
        got=f"timestep {told.timestep:g}",
        allowed="one generation after the other in a thread, unless a pipeline is attached",
        todo="attach a pipeline for each, run them in threads of their own, or finish one before the next begins",
    )


def own_of(verdicts: Mapping[Clock, Verdict], *, alone: bool = True) -> Clock | None:
    """The generation that inputs say a call belongs to; ``alone``: and to one of these it does."""
    own = [clock for clock, verdict in verdicts.items() if verdict is Verdict.OWN]
    if own:
        return own[-1]
    possible = [clock for clock, verdict in verdicts.items() if verdict is not Verdict.OTHER]
    return possible[0] if alone and len(possible) == 1 < len(verdicts) else None


def as_next(clock: Clock, seen: Seen) -> Seen:
    """What a call shows, taken for the next one of ``clock``'s generation."""
    return replace(seen, branch=(clock.position + 1) % clock.calls)


def judged(clock: Clock, seen: Seen) -> Verdict:
    """What the inputs say of a call that is taken for the next one of ``clock``'s generation."""
    return clock.inputs.judge(as_next(clock, seen))


def reference_to(value: Any) -> Callable[[], Any]:
    """A weak reference, or a strong one where there is no weak one."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


def is_of(clock: Clock, scheduler: Any) -> bool:
    """Whether ``clock`` follows ``scheduler``."""
    return clock.scheduler is not None and clock.scheduler() is scheduler


def is_ownerless(clock: Clock) -> bool:
    """Whether the scheduler that ``clock`` followed is gone, or there was none."""
    return clock.scheduler is None or clock.scheduler() is None
