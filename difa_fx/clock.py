"""The step clock: which step of which generation a call of the denoiser is.

The worst fault of a step cache is state that outlives its generation.  The clock therefore goes forward only when
the timestep it is shown is the one that comes next; it starts again, with all state dropped, when a generation
begins; and everything else is an error.  Three sources of truth, best first:

1. the scheduler of an attached pipeline, whose ``set_timesteps`` begins a generation and names its timesteps, in
   which the denoiser may be shown them as they are, as a share of the training steps, or counted from the other end;
2. the plan's own ``timesteps``;
3. neither: timesteps must go on in one direction.  A jump back begins a generation, which is always safe because
   the first step is full everywhere.  The first whole generation teaches the clock the timesteps, and from then
   on they are compared.

Without a timestep in the graph only calls can be counted; then every generation must begin with
``difa_fx.reset(model)``.

A sampler that calls the denoiser twice a step, once for each half of classifier-free guidance, shows it each timestep
twice; the clock counts calls then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from difa_fx.errors import ClockError

_ATTACH = "attach the pipeline (difa_fx.attach(pipe, plan)) or call difa_fx.reset(model) before a generation"


@dataclass(slots=True)
class Clock:
    """Counts the calls of one denoiser.

    Attributes:
        steps: steps of the plan.
        expected: the timesteps of a generation, when they are known, one a step.
        attached: whether a scheduler says when a generation begins.
        calls: calls a step.
        position: the last call that ran; -1 before the first.  With one call a step it is the step.
        generation: grows with every beginning, so that holders of state can tell theirs is old.
        span: steps of the scheduler's training, 1000 as a rule; 0 when unknown.
    """

    steps: int
    expected: tuple[float, ...] | None = None
    attached: bool = False
    calls: int = 1
    position: int = -1
    generation: int = 0
    span: float = 0.0
    _armed: bool = False
    _learned: bool = False
    _seen: list[float] = field(default_factory=list)

    @property
    def timestep(self) -> float | None:
        """The timestep that the last call was shown."""
        return self._seen[-1] if self._seen else None

    def begin(self, timesteps: Sequence[float] | None = None, span: float = 0.0) -> None:
        """A generation is about to start; ``timesteps`` and ``span`` are its scheduler's."""
        self.position = -1
        self.generation += 1
        self._armed = True
        self._seen.clear()
        if timesteps is not None:
            self.attached, self._learned = True, False
            self.expected, self.span = tuple(float(t) for t in timesteps), span

    def release(self, timesteps: Sequence[float] | None) -> None:
        """The scheduler is detached; go by the plan's ``timesteps`` again."""
        self.attached = self._learned = False
        self.expected = None if timesteps is None else tuple(timesteps)
        self.begin()

    def tick(self, timestep: float | None, *, tolerance: float = 0.0) -> int:
        """The number of a call that was shown ``timestep``, from 0; with one call a step, the step.

        Args:
            timestep: value of the graph's timestep input; None when it has none.
            tolerance: relative rounding of the input's dtype.

        Raises:
            ClockError: the call is not the one that comes next.
        """
        if self.attached and self.position < 0 and timestep is not None and self.expected is not None:
            self.expected = self._as_shown(timestep, self.expected, tolerance)
        call = self._next(timestep, tolerance)
        if call == 0 and self.position != -1:
            self.begin()
        self._armed = False
        self.position = call
        if timestep is not None and call % self.calls == 0:
            self._seen.append(timestep)
            if len(self._seen) == self.steps and self.expected is None:
                self.expected, self._learned = tuple(self._seen), True
        return call

    def _as_shown(self, timestep: float, scheduled: Sequence[float], tolerance: float) -> tuple[float, ...] | None:
        """The scheduler's timesteps as the denoiser is shown them, told by the first; None when only it can tell."""
        ways = [tuple(scheduled)]
        if self.span:
            ways.append(tuple(t / self.span for t in scheduled))
            ways.append(tuple(1 - t / self.span for t in scheduled))
            ways.append(tuple(self.span - t for t in scheduled))
        return next((way for way in ways if _same(timestep, way[0], tolerance, largest=max(map(abs, way)))), None)

    def _next(self, timestep: float | None, tolerance: float) -> int:
        following = self.position + 1
        if timestep is None:
            return self._counted(following)
        if self.expected is not None:
            return self._compared(timestep, self.expected, following, tolerance)
        return self._directed(timestep, following)

    def _counted(self, call: int) -> int:
        count = self.steps * self.calls
        if self.attached and call < count:
            return call
        if call == 0 and not self._armed:
            raise ClockError(
                "the denoiser's graph has no timestep, so the beginning of a generation cannot be seen",
                where="step clock",
                todo=_ATTACH,
            )
        if call >= count:
            raise ClockError(
                f"call {call + 1} of a generation, but the plan has {self.steps} steps",
                where="step clock",
                got=f"{call + 1} calls since the last reset",
                allowed=f"{count} calls",
                todo=_ATTACH,
            )
        return call

    def _compared(self, timestep: float, expected: Sequence[float], call: int, tolerance: float) -> int:
        step = call // self.calls
        largest = max(map(abs, expected)) if self.attached else 0.0
        if step < len(expected) and _same(timestep, expected[step], tolerance, largest):
            return call
        if not self.attached and _same(timestep, expected[0], tolerance):
            return 0
        if self._learned and self._jumps_back(timestep):
            self.expected, self._learned = None, False
            return 0
        if step < len(expected):
            wanted = f"{expected[step]:g} (step {step})"
            if call % self.calls:
                wanted += ", for the other half of guidance"
        else:
            wanted = f"a new generation, from {expected[0]:g}"
        if not self.attached and step < len(expected) and step > 0:
            wanted += f", or {expected[0]:g} to begin a new generation"
        raise ClockError(
            "the denoiser was called with a timestep that the plan does not expect now",
            where=f"step clock, after {self._place()}" if call else "step clock, before the first step",
            got=f"timestep {timestep:g}",
            allowed=wanted,
            todo="use the sampler, number of steps and call order that the plan was made for; a sampler that calls the "
            'denoiser twice a step, conditional and unconditional, needs a plan with cfg "cond_call_first" or '
            '"uncond_call_first", and one that calls it once needs another; '
            "after an interrupted generation call difa_fx.reset(model) or scheduler.set_timesteps",
        )

    def _place(self) -> str:
        step, branch = divmod(self.position, self.calls)
        return f"step {step}" + (f", call {branch + 1} of {self.calls}" if self.calls > 1 else "")

    def _directed(self, timestep: float, call: int) -> int:
        step, branch = divmod(call, self.calls)
        if call == 0 or self.steps * self.calls == 1:
            return 0
        last = self._seen[-1]
        if timestep == last and branch:
            return call
        if branch:
            if self._jumps_back(timestep):
                return 0
            raise ClockError(
                "the plan is for two calls a step, and this step had one",
                where=f"step clock, after {self._place()}",
                got=f"timestep {timestep:g} after {last:g}",
                allowed=f"{last:g} again, for the other half of guidance",
                todo='turn guidance on, or use a plan with cfg null, "cond_first" or "uncond_first"',
            )
        if timestep == last:
            if call == 1:
                return 0
            raise ClockError(
                "two calls in a row with the same timestep" if self.calls == 1 else "three calls with one timestep",
                where=f"step clock, after {self._place()}",
                got=f"timestep {timestep:g} again",
                allowed="one call a step" if self.calls == 1 else "two calls a step",
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
        return call

    def _jumps_back(self, timestep: float) -> bool:
        """Whether ``timestep`` turns against the direction in which this generation goes."""
        if len(self._seen) < 2:
            return self.steps == 1
        last, before = self._seen[-1], self._seen[-2]
        return timestep != last and (timestep < last) != (last < before)


def _same(value: float, expected: float, tolerance: float, largest: float = 0.0) -> bool:
    """Equal but for rounding, at the scale of the ``largest`` timestep of a generation where that is known."""
    return abs(value - expected) <= max(tolerance, 1e-6) * max(abs(expected), largest, 1e-12)
