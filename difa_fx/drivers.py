"""Drivers that decide nothing: a generation under a plan, or in full with one step disturbed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from difa_fx.clock import Clock
from difa_fx.device_time import timed
from difa_fx.greedy import finite, replay
from difa_fx.losses import Loss
from difa_fx.plan import Method, Plan
from difa_fx.program import State
from difa_fx.runtime import Runner
from difa_fx.search import Driver, SearchGraph, main_output
from difa_fx.workers import Workers


@dataclass(slots=True)
class Watched:
    """Another driver, with the latents of each step kept on CPU and its seconds."""

    driver: Driver
    latents: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, graph: SearchGraph, step: int, calls: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        """Keep the latents and hand on."""
        position = graph.attention.inputs.latents
        if position is not None:
            self.latents.append(calls[0][position].detach().to("cpu", torch.float32, copy=True))
        outputs: list[tuple[Any, ...]] = []
        self.seconds.append(timed(lambda: outputs.extend(self.driver.step(graph, step, calls)), graph.cuda))
        return outputs


@dataclass(slots=True)
class Planned:
    """A plan, run as it will be used, in one generation after the other.

    Attributes:
        plan: it.
        compiled: whether it has begun a generation, so that all that it runs is compiled.
    """

    plan: Plan
    compiled: bool = False
    _clock: Clock = field(init=False)
    _runner: Runner | None = None

    def __post_init__(self) -> None:
        self._clock = Clock(self.plan.steps, calls=self.plan.calls_per_step)

    def step(self, graph: SearchGraph, step: int, calls: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        """The step's calls under the plan."""
        if self._runner is None:
            self._runner = graph.runner(self.plan, self._clock)
        if step == 0:
            self._clock.begin()
            self.compiled = True
        return [self._runner(*args) for args in calls]


@dataclass(slots=True)
class Disturbed:
    """Full attention but at one step, where every site uses its output of the step before.

    Attributes:
        at: the step, from 1.
        found: the loss of that step's output.
    """

    at: int
    loss: Loss
    workers: Workers
    found: float = 0.0
    _state: State = field(default_factory=dict)

    def step(self, graph: SearchGraph, step: int, calls: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        """Full attention, or every output cached."""
        frontier = graph.start(calls, self._state)
        if step not in (self.at - 1, self.at):
            return graph.complete(frontier)
        full = [Method.FULL] * len(graph.sites)
        if step < self.at:
            frontier = replay(graph, frontier, [full])
            self._state = frontier.state
            return graph.outputs(frontier)
        reference = main_output(graph.complete(frontier))
        outputs = graph.outputs(replay(graph, frontier, [full, [Method.CACHED] * len(graph.sites)]))
        self._state = {}
        loss = self.workers.mean(self.loss(reference, main_output(outputs)))
        self.found = finite(loss, f"step {step}, every site cached")
        return outputs
