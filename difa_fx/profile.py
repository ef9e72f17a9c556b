"""What each method costs and what error it brings, measured along one uncompressed generation.

For a budget the search needs the error of reusing at step t what was computed at any step s before, for every site.  A
trial of each is out of reach (steps^2 of them), so it is split in two that are cheap:

- how far the site's own output (or residual) moved from s to t, from a sample of its values at every step;
- what such a move is worth in the denoiser's output: one trial a step, site and method, at s = t - 1.

error(t, s) = loss of the trial at (t, t - 1) * move(t, s) / move(t, t - 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difa_fx.greedy import finite
from difa_fx.losses import Loss
from difa_fx.plan import Method
from difa_fx.program import State
from difa_fx.search import Frontier, SearchGraph, main_output
from difa_fx.step_times import time_regions
from difa_fx.workers import Workers

_SAMPLED = 16384
"""Values of a site's output, and of its residual, that are kept a step to measure how far they move."""

SINGLE = (Method.CACHED, Method.WINDOW, Method.FULL_CFG)
"""The methods whose error is measured by itself; ``window+cfg`` brings the sum of two."""


@dataclass(slots=True)
class Profiler:
    """A driver that runs in full and measures on the way.

    Attributes:
        loss: how outputs are compared.
        workers: who shares the samples.
        finished: called after each step with the losses so far.
        losses: method, by step and site, of trials against full attention; steps that are there already are not tried.
        seconds: site to method to seconds of its region, measured at the second step where they are not there already.
    """

    loss: Loss
    workers: Workers
    finished: Callable[[list[list[dict[str, float]]]], None]
    losses: list[list[dict[str, float]]] = field(default_factory=list)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    _state: State = field(default_factory=dict)
    _seen: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)

    def step(self, graph: SearchGraph, step: int, calls: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        """Run ``step`` in full; try every method at every site, from the second step on."""
        frontier = graph.start(calls, self._state)
        known = step < len(self.losses)
        reference = main_output(graph.complete(frontier)) if step and not known else None
        timed: set[str] = set()
        losses: list[dict[str, float]] = []
        for number, site in enumerate(graph.sites):
            tried: dict[str, float] = {}
            for method in _singles(graph.candidates, site.refused) if reference is not None else ():
                trial = graph.advance(frontier, [Method.FULL] * step + [method])
                assert reference is not None
                value = self.loss(reference, main_output(graph.complete(trial)))
                tried[method.value] = finite(self.workers.mean(value), f"step {step}, {site.path}, {method}")
            losses.append(tried)
            if step == 1 and site.path not in self.seconds:
                self._time(graph, frontier, number, timed)
            frontier = graph.advance(frontier, [Method.FULL] * (step + 1))
            for kind in ("output", "residual"):
                held = [v for (path, name), v in frontier.state.items() if path == site.path and name.startswith(kind)]
                if held:
                    self._seen.setdefault((site.path, kind), []).append(torch.cat([_sample(v) for v in held]))
        if not known:
            self.losses.append(losses)
            self.finished(self.losses)
        self._state = frontier.state
        return graph.outputs(frontier)

    def moves(self, site: str, kind: str) -> np.ndarray[Any, Any]:
        """[T, T]: mean absolute change of a site's ``output`` or ``residual`` from step s to step t, at [t, s]."""
        seen = torch.stack(self._seen[site, kind])
        found = torch.zeros(len(seen), len(seen), dtype=torch.float64)
        for t in range(len(seen)):
            found[t, :t] = (seen[t] - seen[:t]).abs().mean(1)
        mean: np.ndarray[Any, Any] = self.workers.mean(found).numpy()
        return mean

    def errors(self, number: int, site: str, method: Method) -> np.ndarray[Any, Any]:
        """[T, T]: error of ``method`` at step t with what was computed at step s; ``full+cfg``: at any s alike."""
        steps = len(self.losses)
        kind = "output" if method is Method.CACHED else "residual"
        single = np.array([row[number].get(method.value, 0.0) for row in self.losses])
        if method is Method.FULL_CFG:
            return np.tile(single[:, None], (1, steps))
        if (site, kind) not in self._seen:
            return np.zeros((steps, steps))
        moves = self.moves(site, kind)
        last = np.zeros(steps)
        last[1:] = np.diagonal(moves, -1)
        worth = np.divide(single, last, out=np.zeros(steps), where=last > 0)
        errors: np.ndarray[Any, Any] = moves * worth[:, None]
        return errors

    def seconds_of(self, site: str, method: Method) -> float:
        """Seconds of a site's region under ``method``."""
        return self.seconds[site][method.value] if method.computes else 0.0

    def refresh_seconds(self, site: str, method: Method) -> float:
        """What it takes more when the region hands out a residual."""
        spent = self.seconds[site]
        return max(0.0, spent.get(f"{method}->r", 0.0) - spent.get(method.value, 0.0))

    def _time(self, graph: SearchGraph, frontier: Frontier, number: int, timed: set[str]) -> None:
        """Seconds of each action at a site; sites of one structure share them."""
        site = graph.sites[number]
        structure = graph.structure(number)
        if structure in timed:
            twin = next(s.path for i, s in enumerate(graph.sites) if graph.structure(i) == structure)
            self.seconds[site.path] = self.seconds[twin]
            return
        timed.add(structure)
        self.seconds[site.path] = self.workers.same(time_regions(graph, frontier, graph.timed_entries(number)))


def _singles(candidates: Sequence[Method], refused: Mapping[Method, str]) -> list[Method]:
    """The methods to try by themselves, for a plan that may use ``candidates``."""
    wanted = set(candidates) | ({Method.WINDOW, Method.FULL_CFG} if Method.WINDOW_CFG in candidates else set())
    return [method for method in SINGLE if method in wanted and method not in refused]


def _sample(value: Tensor) -> Tensor:
    flat = value.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLED)
    return flat[::step][:_SAMPLED].to("cpu", torch.float32, copy=True)
