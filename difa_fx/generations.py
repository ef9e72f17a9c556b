"""Whose generation is this: to each call of a denoiser the clock of the generation that it belongs to, or an error.

State belongs to a generation.  A call is proved to belong to one, or refused:

- Callers (threads, tasks) never share a generation.
- With an attached pipeline, a generation begins with ``set_timesteps`` of a scheduler, the pipeline's or a copy of it.
  Its first call may be at any of the scheduler's timesteps; then each must be the next.  Several may run in turn.
- Without one, a generation begins with ``difa_fx.reset``, with the plan's first timestep, or where timesteps turn back.
  One that was cut short before is remembered: a call that could be its next is decided by the inputs
  (:mod:`difa_fx.witness`), or refused.  Where a plan has no timesteps and nobody announced the generation, a call is
  refused that has none of its conditions, or whose latents have nothing in common with its last.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from difa_fx.callers import Caller, caller
from difa_fx.clock import Clock
from difa_fx.elsewhere import other_timesteps, tell
from difa_fx.errors import ClockError
from difa_fx.generation_line import (
    Line,
    Told,
    as_next,
    is_of,
    is_ownerless,
    judged,
    overtaken,
    own_of,
    reference_to,
    untold,
    waits,
)
from difa_fx.plan import Plan
from difa_fx.witness import Seen, Verdict


class Generations:
    """All generations of one denoiser under one plan.

    Args:
        plan: theirs.
        drop: frees the state that a clock's generation left.
        late: announces what schedulers of attached pipelines say that were not heard; whether there was anything.
    """

    def __init__(self, plan: Plan, drop: Callable[[Clock], None], late: Callable[[], bool] = lambda: False) -> None:
        self._plan, self._drop, self._late = plan, drop, late
        self._reads = [any(m.windowed or not m.computes for m in row) for row in plan.methods]
        self._learned: tuple[float, ...] | None = None
        self._lines: weakref.WeakKeyDictionary[Caller, Line] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()
        self.attached = self._told = False

    @property
    def clocks(self) -> tuple[Clock, ...]:
        """Those of all callers."""
        with self._lock:
            return tuple(clock for line in self._lines.values() for clock in line.clocks)

    def latest(self) -> Clock | None:
        """The clock that this caller's last call moved."""
        line = self._lines.get(caller())
        return line.clocks[-1] if line is not None and line.clocks else None

    def begin(self, who: Caller = None) -> None:
        """The next call of this caller, or of ``who``, begins a generation."""
        with self._lock:
            line = self._line(who)
            line.cut.clear()
            clock = line.clocks[-1] if line.clocks else self._added(line)
            for other in line.clocks:
                self._drop(other)
            line.clocks[:] = [clock]
            clock.begin()
            if not clock.attached:
                clock.expected = self._known()

    def announce(
        self,
        timesteps: Sequence[float],
        span: float,
        scheduler: Any,
        *,
        guessed: bool = False,
        who: Caller = None,
    ) -> None:
        """This caller's ``scheduler`` was set to ``timesteps``: a generation of its own is about to begin.

        Args:
            timesteps: as scheduled.
            span: the steps of the scheduler's training.
            scheduler: it.
            guessed: whether it is no attached pipeline's own, but a copy as it seems.
            who: another caller.
        """
        with self._lock:
            self.attached = True
            for line in self._lines.values():
                for clock in [c for c in line.clocks if is_of(c, scheduler)]:
                    self._end(clock)
            mine = self._line(who)
            mine.cut.clear()
            for clock in [c for c in mine.clocks if is_ownerless(c)]:
                self._end(clock)
            idle = [c for c in mine.clocks if c.position == c.count - 1]
            clock = idle[0] if idle else Clock(self._plan.steps, calls=self._plan.calls_per_step)
            mine.clocks[:] = [c for c in mine.clocks if c not in idle]
            mine.clocks.append(clock)
            self._drop(clock)
            clock.scheduler, clock.guessed = reference_to(scheduler), guessed
            clock.begin(timesteps, span)

    def release(self) -> None:
        """No pipeline is attached any more; the plan's timesteps count again."""
        with self._lock:
            self.attached = False
            for clock in self.clocks:
                self._drop(clock)
            self._lines.clear()

    def tick(self, told: Told) -> Clock:
        """The clock of the generation that this caller's call belongs to, moved on to it.

        Raises:
            ClockError: it belongs to none, or cannot be told.
            PlanError: it would begin a generation of another number of steps than the plan.
        """
        with self._lock:
            line = self._line()
            clock = (self._scheduled if self.attached else self._unattended)(line, told)
            line.clocks.remove(clock)
            line.clocks.append(clock)
            clock.inputs.note(replace(told.seen(), branch=clock.position % clock.calls))
            if clock.position == clock.count - 1:
                line.cut.clear()
                if not clock.attached and not clock.first and clock.expected is None and told.timestep is not None:
                    self._learned = clock.expected = clock.seen
            return clock

    def abandon(self) -> None:
        """A call of this caller was refused: what it runs is given up, as far as only one generation runs."""
        with self._lock:
            line = self._line()
            if len(line.clocks) == 1:
                self._drop(line.clocks[0])

    def _line(self, who: Caller = None) -> Line:
        return self._lines.setdefault(caller() if who is None else who, Line())

    def _known(self) -> tuple[float, ...] | None:
        return self._plan.timesteps or self._learned

    def _added(self, line: Line) -> Clock:
        clock = Clock(self._plan.steps, self._known(), calls=self._plan.calls_per_step)
        line.clocks.append(clock)
        return clock

    def _end(self, clock: Clock) -> None:
        """``clock``'s generation is over, whether it came to its end or not."""
        self._drop(clock)
        clock.position = clock.count - 1
        clock.scheduler = None

    def _scheduled(self, line: Line, told: Told) -> Clock:
        """The clock of a call under schedulers that are heard."""
        if told.timestep is None:
            clock = line.clocks[-1] if line.clocks else self._added(line)
            clock.tick(None)
            return clock
        found = self._fitting(line, told)
        if found is None and not waits(line) and self._late():
            found = self._fitting(line, told)
        if found is None:
            found = self._unclaimed(line, told)
        if found is not None:
            return found
        misfit = next((c.misfit for c in reversed(line.clocks) if c.misfit is not None and c.position < 0), None)
        if misfit is not None:
            raise misfit
        if line.clocks and line.clocks[-1].expected is not None:
            raise line.clocks[-1].unexpected(told.timestep)
        raise ClockError(
            "no scheduler of an attached pipeline was set to its timesteps in this thread",
            where="step clock",
            got=f"timestep {told.timestep:g}",
            allowed="a call in the thread (or task) in which the pipeline runs",
            todo="call the pipeline, or scheduler.set_timesteps in this thread; detach the pipeline to call the "
            "denoiser without it",
        )

    def _fitting(self, line: Line, told: Told) -> Clock | None:
        timestep, grid, seen = told.timestep, told.grid, told.seen()
        assert timestep is not None
        for loose in (False, True):
            going = [c for c in line.clocks if c.position >= 0 and c.expects(timestep, grid, loose=loose)]
            going = [c for c in going if not c.inputs.foreign(as_next(c, seen))]
            waiting = [c for c in line.clocks if c.position < 0]
            starts = {c: step for c in waiting if (step := c.place_of(timestep, grid, loose=loose)) is not None}
            if not going and not starts:
                continue
            clock = self._chosen(going, list(starts), told)
            if clock in starts:
                clock.first = starts[clock]
                self._compare(clock)
            clock.tick(timestep, grid=grid)
            return clock
        return None

    def _compare(self, clock: Clock) -> None:
        """Say, once, that a scheduler's timesteps are not those that the plan was made with."""
        found = None if self._told or clock.expected is None else other_timesteps(self._plan, clock.expected)
        if found is not None:
            self._told = True
            tell(self._plan, [found])

    def _chosen(self, going: list[Clock], waiting: list[Clock], told: Told) -> Clock:
        """Which of several generations a call belongs to."""
        if len(going) == 1 and not waiting:
            return going[0]
        if not going:
            return waiting[-1]
        seen = told.seen()
        verdicts = {clock: judged(clock, seen) for clock in going}
        own = own_of(verdicts, alone=not waiting)
        if own is not None:
            return own
        if waiting and all(verdict is Verdict.OTHER for verdict in verdicts.values()):
            return waiting[-1]
        raise untold(told, going[-1], "several generations of this thread could go on with it")

    def _unclaimed(self, line: Line, told: Told) -> Clock | None:
        """A generation that was announced in another thread and not begun there, if there is only one.

        It begins here, where none runs; should it begin there, too, that is another one.
        """
        waiting = [
            clock
            for other in self._lines.values()
            for clock in other.clocks
            if other is not line and clock.position < 0 and clock.scheduler is not None
        ]
        going = any(clock.scheduler is not None and clock.position < clock.count - 1 for clock in line.clocks)
        if len(waiting) != 1 or going:
            return None
        line.clocks.append(waiting[0].announced_again())
        return self._fitting(line, told)

    def _unattended(self, line: Line, told: Told) -> Clock:
        """The clock of a call without a scheduler."""
        clock = line.clocks[-1] if line.clocks else self._added(line)
        timestep, grid = told.timestep, told.grid
        if timestep is None:
            clock.tick(None)
            return clock
        if clock.position < 0 and clock.announced:
            clock.first = clock.place_of(timestep, grid) or 0
            clock.tick(timestep, grid=grid)
            return clock
        for loose in (False, True):
            going = [c for c in (*line.cut, clock) if c.expects(timestep, grid, loose=loose)]
            begins = clock.begins_with(timestep, grid, loose=loose)
            if going or begins:
                break
        if begins and not (going and self._goes_on(going, clock, told)):
            self._begin(line, clock)
        elif going and not begins:
            self._check(going, clock, told)
        elif not begins and clock.expected is not None and clock.expected == self._learned != self._plan.timesteps:
            if not clock.turns_back(timestep):
                raise clock.unexpected(timestep)
            self._learned = None  # another sampler than the one that was learned from
            self._begin(line, clock)
            clock.expected = None
        clock.tick(timestep, grid=grid)
        return clock

    def _begin(self, line: Line, clock: Clock) -> None:
        if clock.running:
            line.cut.append(clock.resume())
        self._drop(clock)
        clock.begin(announced=False)
        clock.expected = self._known()

    def _goes_on(self, going: list[Clock], clock: Clock, told: Told) -> bool:
        """Whether a call goes on with ``clock``'s generation that could begin one as well."""
        if clock in going and clock.announced and not clock.ambiguous(told.grid):
            return True
        seen = told.seen()
        verdicts = {other: judged(other, seen) for other in going}
        if verdicts.get(clock) is Verdict.OWN:
            return True
        self._refuse_overtaken(verdicts, told)
        if Verdict.UNKNOWN not in verdicts.values():
            return False
        raise untold(told, clock, "it could begin a generation, and go on with the one that runs")

    def _check(self, going: list[Clock], clock: Clock, told: Told) -> None:
        """Raise ClockError unless a call goes on with ``clock``'s generation and with no other."""
        if clock in going and not self._reads[clock.first + (clock.position + 1) // clock.calls]:
            return  # what reads no state cannot read another's
        seen = told.seen()
        if going == [clock] and not clock.ambiguous(told.grid) and self._vouched(clock, seen, told):
            return
        verdicts = {other: judged(other, seen) for other in going}
        mine = verdicts.get(clock)
        if mine is Verdict.OWN or (len(going) > 1 and own_of(verdicts) is clock):
            return
        self._refuse_overtaken(verdicts, told)
        if going != [clock]:
            raise untold(told, clock, "another generation was cut short, and could go on with it, too")
        if mine is Verdict.OTHER:
            raise untold(told, clock, "none of its conditions are those of the generation that runs")
        if clock.ambiguous(told.grid):
            raise untold(told, clock, "its dtype cannot tell this step's timestep from the last one's")
        if seen.latents is None or (mine is Verdict.UNRELATED and seen.conditions):
            raise untold(told, clock, "the plan has no timesteps, and its latents are not those of the one that runs")

    def _vouched(self, clock: Clock, seen: Seen, told: Told) -> bool:
        """Whether a reset, or timesteps that are known, vouch for a call with ``clock``'s next timestep.

        Raises:
            ClockError: nobody announced the generation, and the call has none of its conditions.
        """
        if not clock.announced and clock.inputs.departs(as_next(clock, seen)):
            raise untold(told, clock, "none of its conditions are those of the generation that runs")
        return clock.announced or clock.expected is not None

    def _refuse_overtaken(self, verdicts: Mapping[Clock, Verdict], told: Told) -> None:
        own = own_of(verdicts)
        if own is not None:
            raise overtaken(told, own)
