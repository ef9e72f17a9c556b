"""What a site costs under each method, from whole steps of the denoiser.

A site's region timed by itself (:func:`time_regions`) says how sites differ, and too little of what a method saves: a
``cached`` site also spares the norm before it, and its input need not come out of the caches.  So whole steps are
timed, each with one method at all sites (:class:`StepsInTurn`), and :func:`fitted` stretches the regions' seconds so
that they add up to them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from difa_fx.device_time import timed
from difa_fx.plan import Method
from difa_fx.schedule import SiteStep
from difa_fx.search import Driver, Frontier, SearchGraph

TURNS: Final = 7
"""How often a region, and a step of each kind, is timed."""

Seconds = Mapping[str, float]
"""``full``, ``window`` and so on, with ``->r`` where a residual is handed out, to seconds."""


@dataclass(slots=True)
class StepsInTurn:
    """A driver that runs every step under several others, one after the other, and goes on with ``full``.

    The first step is not timed: all that is compiled is compiled there.

    Attributes:
        drivers: by the name of the method that they use at all sites.
        seconds: of each of their steps.
        spent: time in all of them together.
    """

    drivers: Mapping[str, Driver]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    spent: float = 0.0

    def step(self, graph: SearchGraph, step: int, calls: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        """The step under each, beginning with another one each time."""
        names = list(self.drivers)
        turn = step % len(names)
        outputs: dict[str, list[tuple[Any, ...]]] = {}
        for name in (*names[turn:], *names[:turn]):

            def run(name: str = name) -> None:
                outputs[name] = self.drivers[name].step(graph, step, calls)

            spent = timed(run, graph.cuda)
            self.spent += spent
            if step:
                self.seconds.setdefault(name, []).append(spent)
        return outputs[Method.FULL.value]

    @property
    def enough(self) -> bool:
        """Whether each was timed often enough."""
        return all(len(self.seconds.get(name, ())) >= TURNS for name in self.drivers)

    @property
    def typical(self) -> dict[str, float]:
        """Median seconds of a step of each."""
        return {name: statistics.median(times) for name, times in self.seconds.items()}


def time_regions(graph: SearchGraph, frontier: Frontier, entries: Mapping[str, Sequence[SiteStep]]) -> dict[str, float]:
    """Median seconds of the next site's region under each entry; the entries take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    for turn in range(TURNS + 2):
        for name, entry in entries.items():
            spent = timed(lambda entry=entry: graph.run_site(frontier, entry), graph.cuda)  # type: ignore[misc]
            if turn >= 2:
                seconds[name].append(spent)
    return {name: statistics.median(times) for name, times in seconds.items()}


def fitted(regions: Mapping[str, Seconds], steps: Seconds) -> dict[str, dict[str, float]]:
    """Seconds of each site under each method, so that together they are what a whole step takes more than a cached one.

    Args:
        regions: site to what its region takes by itself; ``cached`` takes nothing.
        steps: method at all sites to what a step takes; where a site cannot do it, it was full there.
    """
    full, cached = Method.FULL.value, Method.CACHED.value
    if full not in steps or cached not in steps:
        return {site: dict(seconds) for site, seconds in regions.items()}
    stretch = {full: _ratio(steps[full] - steps[cached], sum(seconds[full] for seconds in regions.values()))}
    for name in set(steps) - {full, cached}:
        able = [seconds for seconds in regions.values() if name in seconds]
        others = stretch[full] * sum(seconds[full] for seconds in regions.values() if name not in seconds)
        stretch[name] = _ratio(steps[name] - steps[cached] - others, sum(seconds[name] for seconds in able))
    return {
        site: {name: spent * stretch.get(name.removesuffix("->r"), 1.0) for name, spent in seconds.items()}
        for site, seconds in regions.items()
    }


def _ratio(whole: float, parts: float) -> float:
    """How much longer than its parts a whole takes; never less than nothing."""
    return max(whole, 0.0) / parts if parts > 0 else 1.0
