"""The step clock: which step of one generation a call of the denoiser is.

The worst fault of a step cache is state that outlives its generation.  The clock therefore goes forward only when
the timestep it is shown is the one that comes next; it starts again, with all state dropped, when a generation
begins; and everything else is an error.  Three sources of truth, best first:

1. the scheduler of an attached pipeline, whose ``set_timesteps`` begins a generation and names its timesteps, in
   which the denoiser may be shown them as they are, as a share of the training steps, or counted from the other end;
2. the plan's own ``timesteps``;
3. neither: timesteps must go on in one direction.

Whose generation a call belongs to is for :mod:`difa_fx.generations`, which has a clock for each that runs.  Timesteps
are compared on the grid of the dtype in which the denoiser is shown them: bfloat16 has steps of 4 at 1000.

Without a timestep in the graph only calls can be counted; then every generation must begin with
``difa_fx.reset(model)``.

A sampler that calls the denoiser twice a step, once for each half of classifier-free guidance, shows it each timestep
twice; the clock counts calls then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from difa_fx.errors import ClockError, PlanError
from difa_fx.witness import Witness

ATTACH: Final = "attach the pipeline (difa_fx.attach(pipe, plan)) or call difa_fx.reset(model) before a generation"

_MAX_SHOWN: Final = 6

Grid = Callable[[float], tuple[float, float]]
"""A number as the timestep's dtype has it, and the distance of its neighbours there."""


def exact(value: float) -> tuple[float, float]:
    """The grid of Python's own numbers."""
    return value, 0.0


@dataclass(eq=False)
class Clock:
    """Counts the calls of one generation after the other, as one caller makes them.

    Attributes:
        steps: steps of the plan.
        expected: the timesteps of a generation, when they are known, one a step.
        attached: whether a scheduler says when a generation begins.
        calls: calls a step.
        first: the step at which this generation began; not 0 where only a part of the steps is run.
        position: the last call that ran, counted from the generation's first; -1 before it.
        generation: grows with every beginning, so that holders of state can tell theirs is old.
        span: steps of the scheduler's training, 1000 as a rule; 0 when unknown.
        announced: whether the generation was announced, by a scheduler or by a reset.
        scheduler: of an attached pipeline.
        guessed: whether that is no attached pipeline's own, but a copy as it seems.
        inputs: what the generation's inputs were.
        misfit: why a call that the scheduler expects cannot be a generation's first.
        sessions: what each runner holds of it; they go with the clock.
    """

    steps: int
    expected: tuple[float, ...] | None = None
    attached: bool = False
    calls: int = 1
    first: int = 0
    position: int = -1
    generation: int = 0
    span: float = 0.0
    announced: bool = False
    scheduler: Callable[[], Any] | None = None
    guessed: bool = False
    misfit: PlanError | None = None
    inputs: Witness = field(default_factory=Witness)
    sessions: dict[Any, Any] = field(default_factory=dict, repr=False)
    _scheduled: tuple[float, ...] | None = None
    _seen: list[float] = field(default_factory=list)

    @property
    def timestep(self) -> float | None:
        """The timestep that the last call was shown."""
        return self._seen[-1] if self._seen else None

    @property
    def seen(self) -> tuple[float, ...]:
        """The timesteps of this generation's steps so far."""
        return tuple(self._seen)

    @property
    def count(self) -> int:
        """Calls of the whole generation."""
        return (self.steps - self.first) * self.calls

    @property
    def running(self) -> bool:
        """Whether the generation has begun and not ended."""
        return 0 <= self.position < self.count - 1

    @property
    def step(self) -> int:
        """The plan's step of the last call."""
        return self.first + max(self.position, 0) // self.calls

    def begin(
        self, timesteps: Sequence[float] | None = None, span: float = 0.0, *, announced: bool = True, first: int = 0
    ) -> None:
        """A generation is about to start; ``timesteps`` and ``span`` are its scheduler's."""
        self.position, self.first = -1, first
        self.generation += 1
        self.announced, self.misfit = announced, None
        self.inputs = Witness()
        self._seen.clear()
        if timesteps is not None:
            self.attached = True
            self._scheduled = self.expected = tuple(float(t) for t in timesteps)
            self.span = span

    def expects(self, timestep: float, grid: Grid = exact, *, loose: bool = False) -> bool:
        """Whether a call that was shown ``timestep`` can be the next of this generation, which has begun."""
        following = self.position + 1
        if not 0 < following < self.count:
            return False
        step, branch = divmod(following, self.calls)
        if self.expected is not None:
            return self._is(timestep, self.first + step, grid, loose)
        last = self._seen[-1]
        return timestep == last if branch else timestep != last and not self.turns_back(timestep)

    def begins_with(self, timestep: float, grid: Grid = exact, *, loose: bool = False) -> bool:
        """Whether a new generation can begin with ``timestep``, as far as timesteps tell."""
        if self.expected is not None:
            return self._is(timestep, 0, grid, loose)
        if self.position < 0 or self.count == 1:
            return True
        again = self.calls == 1 and self.position == 0 and timestep == self._seen[-1]
        return again or self.turns_back(timestep)

    def place_of(self, timestep: float, grid: Grid = exact, *, loose: bool = False) -> int | None:
        """The step whose timestep this is, before the first call; None if there is none.

        A scheduler's timesteps are taken as the denoiser is shown them from here on.
        """
        if self.expected is None:
            return 0
        for way in self._ways() if self.attached else (self.expected,):
            largest = max(map(abs, way), default=0.0) if self.attached else 0.0
            for step, expected in enumerate(way):
                if same(timestep, expected, grid, loose, largest):
                    return self._placed(way, step)
        return None

    def _placed(self, way: tuple[float, ...], step: int) -> int | None:
        """The plan's step for the scheduler's number ``step``; it runs all of the plan's steps, or a last part of them.

        None where the plan is for another number of steps.
        """
        if len(way) == self.steps:
            self.expected = way
            return step
        if len(way) - step == self.steps:  # of what is scheduled only a part is run, and the plan is for that
            self.expected = way[step:]
            return 0
        self.misfit = other_steps(self.steps, way, step)
        return None

    def tick(self, timestep: float | None, *, grid: Grid = exact) -> int:
        """The number of the next call, which was shown ``timestep``; for one that was found to be it, or for none.

        Raises:
            ClockError: the call is not the one that comes next.
        """
        call = self._next(timestep, grid)
        if call == 0 and self.position != -1:
            self.begin(announced=False)
        self.position = call
        if timestep is not None and call % self.calls == 0:
            self._seen.append(timestep)
        return call

    def turns_back(self, timestep: float) -> bool:
        """Whether ``timestep`` turns against the direction in which this generation goes."""
        if len(self._seen) < 2:
            return self.steps == 1
        last, before = self._seen[-1], self._seen[-2]
        return timestep != last and (timestep < last) != (last < before)

    def resume(self) -> Clock:
        """The generation as it is, apart from what this clock does next."""
        return replace(self, _seen=list(self._seen), sessions={})

    def ambiguous(self, grid: Grid) -> bool:
        """Whether the next step has another timestep than the last one, and the dtype cannot tell them apart."""
        step, branch = divmod(self.position + 1, self.calls)
        if self.expected is None or branch or not self.first < self.first + step < self.steps:
            return False
        last, following = self.expected[self.first + step - 1], self.expected[self.first + step]
        return last != following and grid(last)[0] == grid(following)[0]

    def announced_again(self) -> Clock:
        """A clock for a generation with the same scheduler, which has not begun."""
        made = Clock(self.steps, calls=self.calls, scheduler=self.scheduler, guessed=self.guessed)
        made.begin(self._scheduled, self.span)
        return made

    @property
    def _largest(self) -> float:
        return max(map(abs, self.expected)) if self.attached and self.expected else 0.0

    def _is(self, timestep: float, step: int, grid: Grid, loose: bool) -> bool:
        """Whether ``timestep`` is that of ``step``; a neighbour on the grid is not, if it is another step's own."""
        assert self.expected is not None
        if not same(timestep, self.expected[step], grid, loose, self._largest):
            return False
        return not loose or not any(same(timestep, other, grid) for other in self.expected)

    def _ways(self) -> list[tuple[float, ...]]:
        """The scheduler's timesteps as a denoiser may be shown them."""
        scheduled = self._scheduled or self.expected or ()
        ways = [scheduled]
        if self.span:
            ways.append(tuple(t / self.span for t in scheduled))
            ways.append(tuple(1 - t / self.span for t in scheduled))
            ways.append(tuple(self.span - t for t in scheduled))
        return ways

    def _next(self, timestep: float | None, grid: Grid) -> int:
        following = self.position + 1
        if timestep is None:
            return self._counted(following)
        if following == 0:
            if self.expected is None or any(self._is(timestep, self.first, grid, loose) for loose in (False, True)):
                return 0
        elif any(self.expects(timestep, grid, loose=loose) for loose in (False, True)):
            return following
        elif not self.attached and self.begins_with(timestep, grid):
            return 0
        raise self.unexpected(timestep)

    def _counted(self, call: int) -> int:
        if (self.attached or self.announced) and call < self.count:
            return call
        if call == 0:
            raise ClockError(
                "the denoiser's graph has no timestep, so the beginning of a generation cannot be seen",
                where="step clock",
                todo=ATTACH,
            )
        raise ClockError(
            f"call {call + 1} of a generation, but the plan has {self.steps} steps",
            where="step clock",
            got=f"{call + 1} calls since the last reset",
            allowed=f"{self.count} calls",
            todo=ATTACH,
        )

    def unexpected(self, timestep: float) -> ClockError:
        """The error for a call that was shown ``timestep`` and is neither the next nor the first of a generation."""
        return self._not_expected(timestep) if self.expected is not None else self._against_direction(timestep)

    def _not_expected(self, timestep: float) -> ClockError:
        assert self.expected is not None
        call = self.position + 1
        step = self.first + call // self.calls
        if call < self.count:
            wanted = f"{self.expected[step]:g} (step {step})"
            if call % self.calls:
                wanted += ", for the other half of guidance"
        else:
            wanted = f"a new generation, from {self.expected[0]:g}"
        if not self.attached and 0 < call < self.count:
            wanted += f", or {self.expected[0]:g} to begin a new generation"
        return ClockError(
            "the denoiser was called with a timestep that the plan does not expect now",
            where=f"step clock, after {self.place()}" if call else "step clock, before the first step",
            got=f"timestep {timestep:g}",
            allowed=wanted,
            todo="use the sampler, number of steps and call order that the plan was made for; a sampler that calls the "
            'denoiser twice a step, conditional and unconditional, needs a plan with cfg "cond_call_first" or '
            '"uncond_call_first", and one that calls it once needs another; '
            "after an interrupted generation call difa_fx.reset(model) or scheduler.set_timesteps",
        )

    def place(self) -> str:
        """The last call, in words."""
        branch = max(self.position, 0) % self.calls
        return f"step {self.step}" + (f", call {branch + 1} of {self.calls}" if self.calls > 1 else "")

    def _against_direction(self, timestep: float) -> ClockError:
        branch = (self.position + 1) % self.calls
        last = self._seen[-1]
        if branch:
            return ClockError(
                "the plan is for two calls a step, and this step had one",
                where=f"step clock, after {self.place()}",
                got=f"timestep {timestep:g} after {last:g}",
                allowed=f"{last:g} again, for the other half of guidance",
                todo='turn guidance on, or use a plan with cfg null, "cond_first" or "uncond_first"',
            )
        if timestep == last:
            return ClockError(
                "two calls in a row with the same timestep" if self.calls == 1 else "three calls with one timestep",
                where=f"step clock, after {self.place()}",
                got=f"timestep {timestep:g} again",
                allowed="one call a step" if self.calls == 1 else "two calls a step",
                todo="give the plan its 'timesteps', or " + ATTACH,
            )
        return ClockError(
            f"the generation goes on after the plan's {self.steps} steps",
            where="step clock",
            got=f"timestep {timestep:g} after {last:g}",
            allowed=f"{self.steps} steps",
            todo=f"run the sampler for {self.steps} steps, or use a plan made for this number",
        )


def other_steps(steps: int, timesteps: Sequence[float], first: int = 0) -> PlanError:
    """The error for a generation of another number of steps than the plan's."""
    count = len(timesteps) - first
    head = ", ".join(f"{t:g}" for t in timesteps[first : first + _MAX_SHOWN])
    return PlanError(
        "the generation has another number of steps than the plan",
        where="scheduler.set_timesteps",
        got=f"{count} calls of the denoiser, at timesteps {head}{', ...' if count > _MAX_SHOWN else ''}"
        + (f"; {len(timesteps)} are scheduled" if first else ""),
        allowed=f"{steps}, or the last of {steps} that are scheduled",
        todo=f"pass num_inference_steps={steps}, or use a plan made for {count} steps",
    )


def same(value: float, expected: float, grid: Grid = exact, loose: bool = False, largest: float = 0.0) -> bool:
    """Whether two timesteps are equal on ``grid``.

    Args:
        value: as the denoiser was shown it.
        expected: as it is known.
        grid: of the dtype in which it was shown.
        loose: a neighbour on the grid is taken, too, since samplers may round more than once.
        largest: timestep of a generation, where that is known; near 0 it gives the scale of rounding.
    """
    rounded, spacing = grid(expected)
    close = 1e-6 * max(abs(expected), largest, 1e-12)
    if not loose:
        return abs(value - rounded) <= close
    _, coarse = grid(largest)
    return abs(value - expected) <= max(close, 1.5 * spacing, coarse if spacing else 0.0)
