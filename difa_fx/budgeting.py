"""A plan for a budget: profile the denoiser, find out at which steps errors matter, choose, and see whether it holds.

1. One generation in full tells what each method costs and what error it brings (:mod:`difa_fx.profile`).
2. A few generations with a single step disturbed tell how much of a step's error is left in the final sample: an
   error at a noisy step is mostly mended by the steps after it.
3. The solver takes the least error within the budget (:mod:`difa_fx.budget`).
4. The plan runs; where the time it saves is less than predicted, the budget is cut and the solver asked again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch

from difa_fx.budget import Choice, SiteCosts, choose, least_seconds, plan_seconds
from difa_fx.checkpoint import Record
from difa_fx.cost import attention_flops, kept
from difa_fx.drivers import Disturbed, Planned
from difa_fx.errors import CalibrationError
from difa_fx.generation import Generation, drift
from difa_fx.losses import Loss
from difa_fx.plan import Method, Plan
from difa_fx.profile import SINGLE, Profiler
from difa_fx.search import Backend, SearchGraph
from difa_fx.workers import Workers

_PROBES = 6
_REFINEMENTS = 2
_CLOSE = 0.98
"""A plan that reaches this share of the target speed-up is taken."""

Array = np.ndarray[Any, Any]


class Job(Protocol):
    """What a calibration offers to this module."""

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

    def make_plan(self, rows: Sequence[Sequence[Method]]) -> Plan:
        """A plan for the denoiser."""
        ...


def choose_for_budget(
    job: Job,
    record: Record,
    *,
    steps: int,
    loss: Loss,
    target_speedup: float | None,
    target_flops: float | None,
) -> tuple[Plan, dict[str, Any]]:
    """The plan of least error that is as fast, or keeps as few operations, as asked; and what was found on the way.

    Args:
        job: the calibration.
        record: where the profile is kept; other targets for the same denoiser use it too.
        steps: T.
        loss: how outputs are compared.
        target_speedup: of a whole generation; or None.
        target_flops: attention operations to keep, as a fraction; or None.

    Raises:
        CalibrationError: the target cannot be met.
    """
    profiler = _profile(job, record, steps, loss)
    graph = job.backend.graph
    assert graph is not None
    full = _full_seconds(job, record, steps)
    weights = _weights(job, record, steps, loss, full["result"])
    times = _site_costs(graph, profiler, weights, by_flops=False)
    if target_flops is not None:
        counts = _site_costs(graph, profiler, weights, by_flops=True)
        whole = steps * sum(site.seconds[Method.FULL] for site in counts)
        least = least_seconds(counts) / whole
        _check_reachable(target_flops, least, "target_flops", "of the attention's operations", at_least=False)
        choice = choose(counts, budget_seconds=target_flops * whole)
        return _result(job, graph, choice, times, full["seconds"], 1.0)
    assert target_speedup is not None
    return _fast_enough(job, graph, times, full["seconds"], target_speedup, steps)


def _fast_enough(
    job: Job,
    graph: SearchGraph,
    times: Sequence[SiteCosts],
    full: float,
    target: float,
    steps: int,
) -> tuple[Plan, dict[str, Any]]:
    whole = steps * sum(site.seconds[Method.FULL] for site in times)
    worth = 1.0
    for attempt in range(_REFINEMENTS + 1):
        best = full / (full - worth * (whole - least_seconds(times)))
        _check_reachable(target, best, "target_speedup", "times the speed of full attention", at_least=True)
        choice = choose(times, budget_seconds=whole - full * (1 - 1 / target) / worth)
        plan, findings = _result(job, graph, choice, times, full, worth)
        if attempt == _REFINEMENTS:
            break
        pair = []
        for rows in ([[Method.FULL] * len(plan.sites)] * steps, plan.methods):
            job.generate(Planned(plan.replace(methods=rows)), "measure")
            pair.append(job.workers.same(job.generation.seconds))
        job.say(f"{findings['predicted']['speed_up']:.2f}x predicted, {pair[0] / pair[1]:.2f}x measured")
        if pair[0] / pair[1] >= _CLOSE * target:
            break
        saved = whole - choice.seconds
        worth = max((1 - pair[1] / pair[0]) * full / saved, worth / 2) if saved > 0 else worth
    return plan, findings


def _profile(job: Job, record: Record, steps: int, loss: Loss) -> Profiler:
    losses = list(record.found.get("losses", []))
    with job.bar("profile", steps) as bar:
        bar.update(len(losses))

        def finished(found: list[list[dict[str, float]]]) -> None:
            record.keep(losses=found)
            bar.update()

        known = dict(record.found.get("seconds", {}))
        profiler = Profiler(loss=loss, workers=job.workers, finished=finished, losses=losses, seconds=known)
        job.generate(profiler, "profile")
    if "seconds" not in record.found:
        record.keep(seconds=profiler.seconds)
    return profiler


def _full_seconds(job: Job, record: Record, steps: int) -> dict[str, Any]:
    """What a generation in full takes, and gives."""
    graph = job.backend.graph
    assert graph is not None
    plan = job.make_plan([[Method.FULL] * len(graph.sites)] * steps)
    spent = []
    for _ in range(1 if "full_seconds" in record.found else 2):
        result = job.generate(Planned(plan), "full attention")
        spent.append(job.workers.same(job.generation.seconds))
    if "full_seconds" not in record.found:
        record.keep(full_seconds=min(spent))
    return {"seconds": float(record.found["full_seconds"]), "result": result}


def _weights(job: Job, record: Record, steps: int, loss: Loss, reference: Any) -> Array:
    """[T]: how much of a step's error is left in the final sample, relative to the mean over the steps."""
    places = sorted({round(float(t)) for t in np.linspace(1, steps - 1, _PROBES)}) if steps > 1 else []
    found: dict[str, float] = dict(record.found.get("left", {}))
    with job.bar("probe", len(places)) as bar:
        for at in places:
            if str(at) not in found:
                driver = Disturbed(at, loss, job.workers)
                left = drift(job.generate(driver, "probe"), reference)
                left = driver.found if left is None else left
                total = float(job.workers.mean(torch.tensor(left, dtype=torch.float64)))
                found[str(at)] = total / driver.found if driver.found > 0 else 0.0
                record.keep(left=found)
            bar.update()
    if not places or not any(found.values()):
        return np.ones(steps)
    weights: Array = np.interp(np.arange(steps), places, [found[str(at)] for at in places])
    weights /= weights.mean()
    return weights


def _site_costs(graph: SearchGraph, profiler: Profiler, weights: Array, *, by_flops: bool) -> list[SiteCosts]:
    """Costs in seconds, or in attention operations, and errors; one record a site."""
    costs = []
    for number, site in enumerate(graph.sites):
        path, shape = site.path, graph.shapes[site.path]
        possible = [m for m in (Method.FULL, *graph.candidates) if m in site.methods]
        cached, window, cfg = (profiler.errors(number, path, m) * weights[:, None] for m in SINGLE)
        if by_flops:
            seconds = {m: float(attention_flops(shape, m, graph.window)) for m in possible}
        else:
            seconds = {m: profiler.seconds_of(path, m) for m in possible}
        costs.append(
            SiteCosts(
                seconds=seconds,
                refresh_seconds=0.0 if by_flops else profiler.refresh_seconds(path, Method.FULL),
                refresh_cfg_seconds=0.0 if by_flops else profiler.refresh_seconds(path, Method.FULL_CFG),
                cached=cached,
                window=window,
                cfg=cfg[:, 0],
            )
        )
    return costs


def _result(
    job: Job, graph: SearchGraph, choice: Choice, times: Sequence[SiteCosts], full: float, worth: float
) -> tuple[Plan, dict[str, Any]]:
    plan = job.make_plan(choice.methods)
    whole = plan.steps * sum(site.seconds[Method.FULL] for site in times)
    seconds = full - worth * (whole - plan_seconds(times, choice.methods))
    predicted = {
        "speed_up": full / seconds,
        "seconds": seconds,
        "flops_kept": kept(plan, graph.shapes, projections=False),
        "error": choice.error,
        "least_error": choice.bound,
    }
    return plan, {"predicted": predicted}


def _check_reachable(asked: float, best: float, name: str, unit: str, *, at_least: bool) -> None:
    if (best >= asked) if at_least else (best <= asked):
        return
    raise CalibrationError(
        "the target cannot be met",
        where=f"calibrate({name}=...)",
        got=asked,
        allowed=f"{'at most' if at_least else 'at least'} {best:.3g} {unit}: that is every step but the first at the "
        "cheapest method everywhere",
        todo=f"ask for {name}={best:.3g} or less demanding, or give more candidates",
    )
