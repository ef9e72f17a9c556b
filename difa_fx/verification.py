"""A plan against full attention, in generations that take turns: how much faster it is, and how far its results are."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from difa_fx.drivers import Planned, Watched
from difa_fx.generation import Generation, drift
from difa_fx.plan import Method, Plan
from difa_fx.search import Backend
from difa_fx.workers import Workers

Rows = Sequence[Sequence[Method]]


class Job(Protocol):
    """What a calibration offers to those who work for it."""

    workers: Workers
    backend: Backend
    generation: Generation

    def generate(self, driver: Any, what: str) -> Any:
        """One generation with ``driver``."""
        ...

    def bar(self, what: str, total: int) -> AbstractContextManager[Any]:
        """A progress bar."""
        ...

    def say(self, text: str) -> None:
        """A line for the user."""
        ...

    def make_plan(self, rows: Rows) -> Plan:
        """A plan for the denoiser."""
        ...

    def planned(self, rows: Rows) -> Planned:
        """What runs such a plan; the same one whenever it is asked for."""
        ...

    def measured(self, plan: Plan, pairs: int) -> Measured:
        """What ``plan`` does beside full attention; measured once."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a plan does, beside full attention.

    Attributes:
        speed_up: median over pairs of generations; below 1 where the plan is slower.
        seconds: median of a generation under ``full`` and under ``plan``.
        step_seconds: likewise of each step.
        drift: relative L2 distance of the latents after each step; empty where the denoiser's graph has none.
        final_drift: the same of what the sampler gives; None when that is no tensor.
    """

    speed_up: float
    seconds: Mapping[str, float]
    step_seconds: Mapping[str, Sequence[float]]
    drift: Sequence[float]
    final_drift: float | None

    def to_dict(self) -> dict[str, Any]:
        """As a plan's provenance holds it."""
        final = {} if self.final_drift is None else {"drift": self.final_drift}
        return {
            "measured": {"speed_up": self.speed_up, "seconds": dict(self.seconds), **final},
            "drift": list(self.drift),
            "step_seconds": {name: list(times) for name, times in self.step_seconds.items()},
        }


def measure(job: Job, plan: Plan, pairs: int) -> Measured:
    """Run ``plan`` and full attention in turn.

    Each runs a whole generation beforehand, unless it has run before, so that nothing is compiled in what is timed.
    """
    full = [[Method.FULL] * len(plan.sites)] * plan.steps
    drivers = {"full": job.planned(full), "plan": job.planned(plan.methods)}
    cold = [driver for driver in drivers.values() if not driver.compiled]
    seconds: dict[str, list[float]] = {name: [] for name in drivers}
    steps: dict[str, list[list[float]]] = {name: [] for name in drivers}
    latents, results = {}, {}
    with job.bar("measure", len(cold) + 2 * pairs) as bar:
        for driver in cold:
            job.generate(driver, "measure")
            bar.update()
        for _ in range(pairs):
            for name, driver in drivers.items():
                watched = Watched(driver)
                results[name] = job.generate(watched, "measure")
                seconds[name].append(job.generation.seconds)
                steps[name].append(watched.seconds)
                latents[name] = watched.latents
                bar.update()
    ratios = [whole / planned for whole, planned in zip(seconds["full"], seconds["plan"], strict=True)]
    apart = [drift(b, a) for a, b in zip(latents["full"], latents["plan"], strict=True)]
    return job.workers.same(
        Measured(
            speed_up=statistics.median(ratios),
            seconds={name: statistics.median(times) for name, times in seconds.items()},
            step_seconds={n: [statistics.median(t) for t in zip(*runs, strict=True)] for n, runs in steps.items()},
            drift=[_mean(job.workers, value) for value in apart if value is not None],
            final_drift=_optional_mean(job.workers, drift(results["plan"], results["full"])),
        )
    )


def _optional_mean(workers: Workers, value: float | None) -> float | None:
    return None if value is None else _mean(workers, value)


def _mean(workers: Workers, value: float) -> float:
    return float(workers.mean(torch.tensor(value, dtype=torch.float64)))
