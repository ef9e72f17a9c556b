"""A plan for a budget: profile the denoiser, find out at which steps errors matter, choose, and see whether it holds.

1. One generation in full tells what each method costs and what error it brings (:mod:`difa_fx.profile`).
2. A few generations with a single step disturbed tell how much of a step's error is left in the final sample: an
   error at a noisy step is mostly mended by the steps after it.
3. The solver takes the least error within the budget (:mod:`difa_fx.budget`).
4. The plan runs beside full attention; where it saves more or less than predicted, the solver is asked again.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from difa_fx.budget import Choice, SiteCosts, choose, least_seconds, plan_seconds
from difa_fx.checkpoint import Record
from difa_fx.cost import attention_flops, kept
from difa_fx.drivers import Disturbed
from difa_fx.errors import CalibrationError
from difa_fx.generation import drift
from difa_fx.losses import Loss
from difa_fx.plan import Method, Plan
from difa_fx.profile import SINGLE, Profiler
from difa_fx.search import SearchGraph
from difa_fx.step_times import TURNS, StepsInTurn, fitted
from difa_fx.verification import Job

_PROBES = 6
_REFINEMENTS = 2
_CLOSE = 0.98
"""A plan that reaches this share of the target speed-up is taken."""
_CLOSELY = 0.1
"""Where a plan is faster than predicted by more than this share, a better one may be fast enough."""

Array = np.ndarray[Any, Any]


def choose_for_budget(
    job: Job,
    record: Record,
    *,
    steps: int,
    loss: Loss,
    target_speedup: float | None,
    target_flops: float | None,
    pairs: int,
) -> tuple[Plan, dict[str, Any]]:
    """The plan of least error that is as fast, or keeps as few operations, as asked; and what was found on the way.

    Args:
        job: the calibration.
        record: where the profile is kept; other targets for the same denoiser use it too.
        steps: T.
        loss: how outputs are compared.
        target_speedup: of a whole generation; or None.
        target_flops: attention operations to keep, as a fraction; or None.
        pairs: generations that measure a plan for a speed-up, beside as many in full.

    Raises:
        CalibrationError: the target cannot be met.
    """
    if steps == 1:
        raise CalibrationError(
            "a generation of one step has nothing to reuse",
            where="calibrate(num_inference_steps=...)",
            got=steps,
            allowed="2 steps or more",
            todo="ask for more steps, or run without a plan",
        )
    profiler = _profile(job, record, steps, loss)
    times = _step_times(job, record, profiler, steps)
    weights = _weights(job, record, steps, loss, times.reference)
    graph = job.backend.graph
    assert graph is not None
    costs = _site_costs(graph, profiler, weights, by_flops=False)
    if target_flops is not None:
        counts = _site_costs(graph, profiler, weights, by_flops=True)
        whole = steps * sum(site.seconds[Method.FULL] for site in counts)
        least = least_seconds(counts) / whole
        if least > target_flops:
            raise _out_of_reach("target_flops", target_flops, f"at least {least:.3g} of the attention's operations")
        choice = choose(counts, budget_seconds=target_flops * whole)
        return _result(job, graph, choice, costs, times.full, 1.0)
    assert target_speedup is not None
    return _fast_enough(job, graph, costs, times.full, target_speedup, max(pairs, 1))


def _fast_enough(
    job: Job, graph: SearchGraph, costs: Sequence[SiteCosts], full: float, target: float, pairs: int
) -> tuple[Plan, dict[str, Any]]:
    """The plan of least error that is measured to be fast enough, ``full`` being a generation's seconds.

    What a plan saves is predicted, and ``worth`` is how much of that was measured with the plan before.
    """
    steps = costs[0].steps
    whole = steps * sum(site.seconds[Method.FULL] for site in costs)
    least, worth = least_seconds(costs), 1.0
    if full / (full - whole + least) < target:
        worth = _worth_of_fastest(job, costs, full, target, pairs)
    tried: list[tuple[float, Plan, dict[str, Any]]] = []
    for _ in range(_REFINEMENTS + 1):
        budget = max(whole - full * (1 - 1 / target) / worth, least)
        plan, findings = _result(job, graph, choose(costs, budget_seconds=budget), costs, full, worth)
        predicted, measured = findings["predicted"]["speed_up"], job.measured(plan, pairs).speed_up
        job.say(f"{predicted:.2f}x predicted, {measured:.2f}x measured")
        tried.append((measured, plan, findings))
        enough = measured >= _CLOSE * target
        if enough and measured <= predicted * (1 + _CLOSELY):
            return plan, findings
        saved = whole - plan_seconds(costs, plan.methods)
        if saved <= 0:
            break
        worth = min(max((1 - 1 / measured) * full / saved, worth / 2), 2 * worth)
    reached = [found for found in tried if found[0] >= _CLOSE * target]
    if reached:
        return min(reached, key=lambda found: found[2]["predicted"]["error"])[1:]
    measured, plan, findings = max(tried, key=lambda found: found[0])
    warnings.warn(
        f"the plan is measured at {measured:.2f} times full attention; {target:g} was asked for", stacklevel=4
    )
    return plan, findings


def _worth_of_fastest(job: Job, costs: Sequence[SiteCosts], full: float, target: float, pairs: int) -> float:
    """How much of what is predicted for the cheapest methods everywhere is measured.

    Raises:
        CalibrationError: even they are slower than asked.
    """
    whole = costs[0].steps * sum(site.seconds[Method.FULL] for site in costs)
    least = least_seconds(costs)
    plan = job.make_plan(choose(costs, budget_seconds=least).methods)
    measured = job.measured(plan, pairs).speed_up
    if measured < target:
        raise _out_of_reach(
            "target_speedup", target, f"at most {measured:.3g} times the speed of full attention, measured"
        )
    return max((1 - 1 / measured) * full / max(whole - least, 1e-12), 1.0)


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
    return profiler


@dataclass(frozen=True, slots=True)
class _StepTimes:
    """What a generation takes in full, in seconds, and what it gives."""

    full: float
    reference: Any


def _step_times(job: Job, record: Record, profiler: Profiler, steps: int) -> _StepTimes:
    """Time whole steps under each method; fits the profile's seconds to them, unless the record has both."""
    graph = job.backend.graph
    assert graph is not None
    full = [[Method.FULL] * len(graph.sites)] * steps
    if "full_seconds" in record.found:
        reference = job.generate(job.planned(full), "full attention")
        return _StepTimes(float(record.found["full_seconds"]), reference)
    methods = dict.fromkeys([Method.FULL, Method.CACHED, *graph.candidates])
    rows = {
        m.value: [full[0], *[[m if m in s.methods else Method.FULL for s in graph.sites]] * (steps - 1)]
        for m in methods
    }
    turns = StepsInTurn({name: job.planned(those) for name, those in rows.items()})
    others = []  # what a generation takes beside its steps
    with job.bar("time", -(-TURNS // (steps - 1))) as bar:
        while not turns.enough:
            before = turns.spent
            reference = job.generate(turns, "full attention")
            others.append(job.generation.seconds - (turns.spent - before))
            bar.update()
    typical = turns.typical
    seconds = job.workers.same(min(others) + steps * typical[Method.FULL.value])
    profiler.seconds = job.workers.same(fitted(profiler.seconds, typical))
    record.keep(full_seconds=seconds, seconds=profiler.seconds)
    return _StepTimes(seconds, reference)


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


def _out_of_reach(name: str, asked: float, best: str) -> CalibrationError:
    return CalibrationError(
        "the target cannot be met",
        where=f"calibrate({name}=...)",
        got=asked,
        allowed=f"{best}: that is every step but the first at the cheapest method everywhere",
        todo="ask for less, or give more candidates",
    )
