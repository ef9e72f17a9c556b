"""Contenders that take turns, so that whatever disturbs a machine disturbs all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from difa_fx.device_time import timed


def _nothing() -> None:
    """Nothing to prepare."""


@dataclass(frozen=True, slots=True, eq=False)
class Contender:
    """Something whose time is taken.

    Attributes:
        name: of its seconds.
        run: what is timed.
        prepare: called before each run and not timed.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = _nothing


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range of what single rounds gave."""

    median: float
    least: float
    largest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one value."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))


Seconds = dict[str, tuple[float, ...]]
"""Name of a contender to its seconds, a number a round."""


def interleaved(
    contenders: Sequence[Contender], *, rounds: int, warmup: int, cuda: bool, title: str = "", progress: bool = False
) -> Seconds:
    """Seconds of each contender in every round.

    In a round each runs once; the one that begins is another in each round.

    Args:
        contenders: at least one, with names of their own.
        rounds: that count.
        warmup: rounds before, that do not.
        cuda: wait for the device before and after each run.
        title: of the progress bar.
        progress: whether to show it.
    """
    names = [contender.name for contender in contenders]
    assert len(set(names)) == len(names), "contenders have names of their own"
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=(warmup + rounds) * len(names), desc=title, unit="run", disable=not progress, leave=False) as bar:
        for number in range(warmup + rounds):
            first = number % len(contenders)
            for contender in [*contenders[first:], *contenders[:first]]:
                bar.set_postfix_str(contender.name[:40])
                contender.prepare()
                spent = timed(contender.run, cuda)
                if number >= warmup:
                    seconds[contender.name].append(spent)
                bar.update()
    return {name: tuple(found) for name, found in seconds.items()}


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """The ratio of each round."""
    return [a / b for a, b in zip(over, under, strict=True)]
