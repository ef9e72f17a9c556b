"""What a runner needs of the compilation that it belongs to, and what stands for it where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from difa_fx.clock import Clock
from difa_fx.generation_line import Told


class ClockSource(Protocol):
    """Where a runner gets the clock of the generation that a call belongs to."""

    def tick(self, owner: object, told: Told) -> Clock:
        """The clock, moved on to the call; raises ClockError where the call belongs to no generation."""
        ...

    def latest(self, owner: object) -> Clock | None:
        """The clock that the caller's last call moved."""
        ...

    def abandon(self, owner: object) -> None:
        """A call was refused."""
        ...


@dataclass(frozen=True, slots=True)
class OneClock:
    """A single generation, for runs in a known order."""

    clock: Clock

    def tick(self, owner: object, told: Told) -> Clock:
        """See :class:`ClockSource`."""
        self.clock.tick(told.timestep, grid=told.grid)
        return self.clock

    def latest(self, owner: object) -> Clock | None:
        """See :class:`ClockSource`."""
        return self.clock

    def abandon(self, owner: object) -> None:
        """Its sessions are given up by their runner."""


class Company(Protocol):
    """What a runner knows of the compilation that it belongs to."""

    @property
    def runners(self) -> Sequence[Any]:
        """All runners of the compilation."""
        ...

    @property
    def broken(self) -> bool:
        """Whether Dynamo broke the denoiser into several graphs."""
        ...

    @property
    def guided(self) -> bool:
        """Whether the plan's batch holds two halves of guidance."""
        ...

    def check_sites(self) -> None:
        """Raise PlanError when the graphs together lack a site of the plan."""
        ...

    def followed(self) -> Clock | None:
        """In a broken denoiser, the clock that the caller's last graph with a timestep moved."""
        ...

    def follow(self, clock: Clock) -> None:
        """The graphs that this caller runs next belong to ``clock``'s call."""
        ...

    def join(self, owner: object, clock: Clock) -> None:
        """A graph with the parameter ``owner`` follows ``clock``: it is of the same denoiser."""
        ...


class Alone:
    """A runner without company."""

    runners: Sequence[Any] = ()
    broken = guided = False

    def check_sites(self) -> None:
        """Nothing to check."""

    def followed(self) -> Clock | None:
        """Nobody to follow."""

    def follow(self, clock: Clock) -> None:
        """Nobody follows."""

    def join(self, owner: object, clock: Clock) -> None:
        """Nobody follows."""
