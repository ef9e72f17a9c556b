"""What a runner keeps of each denoiser that it serves, and what it tells of itself."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from difa_fx.clock import Clock
from difa_fx.cost import SiteShape
from difa_fx.cuda_graphs import StepGraphs
from difa_fx.program import State


@dataclass(eq=False)
class Session:
    """What a runner holds of the generations that one clock counts; two that take turns have one each.

    Attributes:
        of: the clock; it owns its sessions, and they go with it.
        state: what is held now.
        generation: the one that it is of.
        position: its last call.
        peak_bytes: the most that was held after a call.
        graphs: the calls as CUDA graphs, if they are asked for.
        unequal: on CUDA, whether the last call's halves of guidance differed; read when the next one is there.
    """

    of: weakref.ref[Clock]
    state: State = field(default_factory=dict)
    generation: int = -1
    position: int = -1
    peak_bytes: int = 0
    graphs: StepGraphs | None = None
    unequal: Tensor | None = None

    @property
    def clock(self) -> Clock:
        """The clock."""
        clock = self.of()
        assert clock is not None, "a session outlived its clock"
        return clock

    def abandon(self) -> None:
        """Drop the state, and with it the generation: only the first step of a new one can follow."""
        self.state.clear()
        self.unequal = None
        self.generation = self.position = -1

    def ran(self, call: int) -> bool:
        """Whether ``call`` of the generation that runs now was the last that it served."""
        return self.generation == self.clock.generation and self.position == call

    @property
    def state_bytes(self) -> int:
        """Bytes of state held now; halves shared with an activation count in full."""
        return sum(t.numel() * t.element_size() for t in self.state.values())


@dataclass(frozen=True, slots=True)
class RunnerStats:
    """What a runner did, for reports and tests.

    Attributes:
        sites: paths of its sites.
        shapes: size of each, for :mod:`difa_fx.cost`.
        unique_blocks: structurally different regions and trunks of the repeated part.
        segments: regions and trunks; a step runs a piece for each that it does not take from the state.
        pieces: pieces compiled.
        compile_seconds: time spent on it.
        state_bytes: bytes of state held now, over all sessions.
        peak_state_bytes: the most that one session held after a call.
        predicted_state_bytes: what the schedule says is held after each call.
        calls: calls of the denoiser served.
    """

    sites: tuple[str, ...]
    shapes: Mapping[str, SiteShape]
    unique_blocks: int
    segments: int
    pieces: int
    compile_seconds: float
    state_bytes: int
    peak_state_bytes: int
    predicted_state_bytes: tuple[int, ...]
    calls: int
