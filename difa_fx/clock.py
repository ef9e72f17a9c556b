"""The step clock: which step of which generation a call of the denoiser is.

The worst fault of a step cache is state that outlives its generation.  The clock therefore goes forward only when
the timestep it is shown is the one that comes next; it starts again, with all state dropped, when a generation
begins; and everything else is an error.  Three sources of truth, best first:

1. the scheduler of an attached pipeline, whose ``set_timesteps`` begins a generation and names its timesteps;
2. the plan's own ``timesteps``;
3. neither: timesteps must go on in one direction.  A jump back begins a generation, which is always safe because
   the first step is full everywhere.  The first whole generation teaches the clock the timesteps, and from then
   on they are compared.

Without a timestep in the graph only calls can be counted; then every generation must begin with
``difa_fx.reset(model)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from difa_fx.errors import ClockError

_ATTACH = "attach the pipeline (difa_fx.attach(pipe, plan)) or call difa_fx.reset(model) before a generation"


@dataclass(slots=True)
class Clock:
    """Counts the steps of one denoiser.

    Attributes:
        steps: steps of the plan.
        expected: the timesteps of a generation, when they are known.
        attached: whether a scheduler says when a generation begins.
        position: the last step that ran; -1 before the first.
        generation: grows with every beginning, so that holders of state can tell theirs is old.
    """

    steps: int
    expected: tuple[float, ...] | None = None
    attached: bool = False
    position: int = -1
    generation: int = 0
    _armed: bool = False
    _learned: bool = False
    _seen: list[float] = field(default_factory=list)

    def begin(self, timesteps: Sequence[float] | None = None) -> None:
        """A generation is about to start; ``timesteps`` are its scheduler's."""
        self.position = -1
        self.generation += 1
        self._armed = True
        self._seen.clear()
        if timesteps is not None:
            self.attached, self._learned = True, False
            self.expected = tuple(float(t) for t in timesteps)

    def release(self, timesteps: Sequence[float] | None) -> None:
        """The scheduler is detached; go by the plan's ``timesteps`` again."""
        self.attached = self._learned = False
        self.expected = None if timesteps is None else tuple(timesteps)
        self.begin()

    def tick(self, timestep: float | None, *, tolerance: float = 0.0) -> int:
        """The step of a call that was shown ``timestep``.

        Args:
            timestep: value of the graph's timestep input; None when it has none.
            tolerance: relative rounding of the input's dtype.

        Raises:
            ClockError: the call is not the step that comes next.
        """
        step = self._next(timestep, tolerance)
        if step == 0 and self.position != -1:
            self.begin()
        self._armed = False
        self.position = step
        if timestep is not None:
            self._seen.append(timestep)
            if len(self._seen) == self.steps and self.expected is None:
                self.expected, self._learned = tuple(self._seen), True
        return step

    def _next(self, timestep: float | None, tolerance: float) -> int:
        following = self.position + 1
        if timestep is None:
            return self._counted(following)
        if self.expected is not None:
            return self._compared(timestep, self.expected, following, tolerance)
        return self._directed(timestep, following)

    def _counted(self, step: int) -> int:
        if self.attached and step < self.steps:
            return step
        if step == 0 and not self._armed:
            raise ClockError(
                "the denoiser's graph has no timestep, so the beginning of a generation cannot be seen",
                where="step clock",
                todo=_ATTACH,
            )
        if step >= self.steps:
            raise ClockError(
                f"call {step + 1} of a generation, but the plan has {self.steps} steps",
                where="step clock",
                got=f"{step + 1} calls since the last reset",
                allowed=f"{self.steps} calls",
                todo=_ATTACH,
            )
        return step

    def _compared(self, timestep: float, expected: Sequence[float], step: int, tolerance: float) -> int:
        if step < len(expected) and _same(timestep, expected[step], tolerance):
            return step
        if not self.attached and _same(timestep, expected[0], tolerance):
            return 0
        if self._learned and self._jumps_back(timestep):
            self.expected, self._learned = None, False
            return 0
        if step < len(expected):
            wanted = f"{expected[step]:g} (step {step})"
        else:
            wanted = f"a new generation, from {expected[0]:g}"
        if not self.attached and step < len(expected) and step > 0:
            wanted += f", or {expected[0]:g} to begin a new generation"
        raise ClockError(
            "the denoiser was called with a timestep that the plan does not expect now",
            where=f"step clock, after step {self.position}" if step else "step clock, before the first step",
            got=f"timestep {timestep:g}",
            allowed=wanted,
            todo="use the sampler, number of steps and call order that the plan was made for; "
            "for two calls a step (conditional and unconditional apart) no plan can be kept; "
            "after an interrupted generation call difa_fx.reset(model) or scheduler.set_timesteps",
        )

    def _directed(self, timestep: float, step: int) -> int:
        if step == 0 or self.steps == 1:
            return 0
        last = self._seen[-1]
        if timestep == last:
            if step == 1:
                return 0
            raise ClockError(
                "two calls in a row with the same timestep",
                where=f"step clock, after step {self.position}",
                got=f"timestep {timestep:g} again",
                allowed="one call a step",
                todo="give the plan its 'timesteps', or " + _ATTACH,
            )
        if self._jumps_back(timestep):
            return 0
        if step >= self.steps:
            raise ClockError(
                f"the generation goes on after the plan's {self.steps} steps",
                where="step clock",
                got=f"timestep {timestep:g} after {last:g}",
                allowed=f"{self.steps} steps",
                todo=f"run the sampler for {self.steps} steps, or use a plan made for this number",
            )
        return step

    def _jumps_back(self, timestep: float) -> bool:
        """Whether ``timestep`` turns against the direction in which this generation goes."""
        if len(self._seen) < 2:
            return self.steps == 1
        last, before = self._seen[-1], self._seen[-2]
        return timestep != last and (timestep < last) != (last < before)


def _same(value: float, expected: float, tolerance: float) -> bool:
    return abs(value - expected) <= max(tolerance, 1e-6) * max(abs(expected), 1e-12)
