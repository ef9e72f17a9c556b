"""difa_fx, a single step again and again: the state and the clock are put back to what they were before it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from difa_fx import registry
from difa_fx.bench.plans import MethodPlan
from difa_fx.bench.sampling import latents_at, noise_of
from difa_fx.bench.subject import Subject, timesteps
from difa_fx.clock import Clock
from difa_fx.errors import BenchmarkError
from difa_fx.program import State
from difa_fx.runtime import Runner
from difa_fx.sessions import Session


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A session's state and its clock.

    Attributes:
        clock: a copy.
        state: the session's tensors themselves.
        generation: the session's.
        position: likewise.
        values: copies of the state, where CUDA graphs read it in place and others of them write there.
    """

    clock: Clock
    state: State
    generation: int
    position: int
    values: State = field(default_factory=dict)

    @classmethod
    def of(cls, session: Session, *, copied: bool = False) -> Snapshot:
        """What ``session`` holds now; ``copied``: whether its tensors will be written to."""
        values = {key: value.clone() for key, value in session.state.items()} if copied else {}
        return cls(session.clock.resume(), dict(session.state), session.generation, session.position, values)

    def restore(self, session: Session) -> None:
        """Make ``session`` hold this again."""
        for item in fields(Clock):
            if item.name != "sessions":
                setattr(session.clock, item.name, copy.copy(getattr(self.clock, item.name)))
        for key, value in self.values.items():
            self.state[key].copy_(value)
        session.state.clear()
        session.state.update(self.state)
        session.generation, session.position = self.generation, self.position


def runner_of(subject: Subject, compiled: Callable[..., Any], arguments: Mapping[str, Any]) -> Runner:
    """The runner that the first call of ``compiled`` makes.

    Raises:
        BenchmarkError: the denoiser does not run as one graph.
    """
    before = {id(runner) for runner in registry.runners(subject.model)}
    compiled(**arguments)
    found = [runner for runner in registry.runners(subject.model) if id(runner) not in before]
    if len(found) != 1:
        raise BenchmarkError(
            "the denoiser does not run as one graph",
            where=subject.size.shape,
            got=f"{len(found)} graphs",
            todo="look for graph breaks with TORCH_LOGS=graph_breaks",
        )
    return found[0]


@dataclass(slots=True, eq=False)
class MethodSteps:
    """A compiled denoiser under a :class:`MethodPlan`, each of whose steps can be run at will.

    Attributes:
        subject: the denoiser.
        compiled: compiled with the plan.
        methods: the plan and the steps that are measured.
        generations: how many :meth:`prime` runs; with CUDA graphs it takes several until they are replayed.
        runner: what runs it; set by :meth:`prime`.
    """

    subject: Subject
    compiled: Callable[..., Any]
    methods: MethodPlan
    generations: int = 1
    _runner: Runner | None = None
    _snapshots: dict[str, Snapshot] = field(default_factory=dict)

    @property
    def runner(self) -> Runner:
        """The runner, once :meth:`prime` was called."""
        assert self._runner is not None
        return self._runner

    def prime(self) -> dict[str, Tensor]:
        """Compile, run the whole plan and remember the state before each measured step; what those yield."""
        self._runner = runner_of(self.subject, self.compiled, self.arguments(0, 0))
        outputs = self._generation(first=1)
        for _ in range(self.generations - 1):
            outputs = self._generation()
        return outputs

    def _generation(self, first: int = 0) -> dict[str, Tensor]:
        """All steps from the ``first`` call on."""
        outputs: dict[str, Tensor] = {}
        named = {step: name for name, step in self.methods.steps.items()}
        for step in range(self.methods.plan.steps):
            if step in named:
                self._snapshots[named[step]] = Snapshot.of(self._session, copied=self.generations > 1)
            output = self._step(step, first=first if step == 0 else 0)
            if step in named:
                assert output is not None
                outputs[named[step]] = output
        return outputs

    def restore(self, name: str) -> None:
        """Go back to before the step that ``name`` stands for."""
        self._snapshots[name].restore(self._session)

    def run(self, name: str) -> Any:
        """That step, whose state was restored."""
        return self._step(self.methods.steps[name])

    def state_bytes(self, name: str) -> int:
        """Bytes of state that are held before that step."""
        return sum(value.numel() * value.element_size() for value in self._snapshots[name].state.values())

    def arguments(self, step: int, call: int) -> dict[str, Any]:
        """The arguments of one call."""
        timestep = timesteps(self.methods.plan.steps)[step]
        return self.subject.arguments(latents_at(self.subject, step), timestep, call)

    @property
    def _session(self) -> Session:
        (session,) = self.runner.sessions
        return session

    def _step(self, step: int, first: int = 0) -> Tensor | None:
        """All calls of a step, from the ``first``; the output of the last."""
        output = None
        for call in range(first, self.subject.calls_per_step):
            output = self.compiled(**self.arguments(step, call))
        return None if output is None else noise_of(self.subject, output)
