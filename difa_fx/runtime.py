"""The runner: which call of a generation this is, whose state it goes on with, and the program that runs then.

A denoiser may have several runners: one for each batch and resolution it is called with, and one for each graph where
Dynamo breaks it into several.  State belongs to a runner; one that serves the next call of a generation takes it over
from the one before if it fits, or if the batch went from two halves of guidance to the conditional one alone.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from difa_fx.attention import cfg_half
from difa_fx.clock import Clock
from difa_fx.compile import PieceCompiler
from difa_fx.cost import SiteShape
from difa_fx.cuda_graphs import GraphMaker, Launched
from difa_fx.errors import CFGError, ClockError, DifaError
from difa_fx.passes.find_attention import Attention
from difa_fx.passes.graph_tools import placeholders
from difa_fx.passes.partition import Partition
from difa_fx.passes.rewrite import residual_axis
from difa_fx.passes.sites import AttentionSite
from difa_fx.program import Program, ProgramBuilder, StateKey, output_number
from difa_fx.schedule import FULL, Schedule, SiteStep
from difa_fx.sessions import RunnerStats, Session
from difa_fx.timestep import TimestepReader


class Company(Protocol):
    """What a runner knows of the compilation that it belongs to."""

    @property
    def runners(self) -> Sequence[Runner]:
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


class Alone:
    """A runner without company."""

    runners: Sequence[Runner] = ()
    broken = guided = False

    def check_sites(self) -> None:
        """Nothing to check."""


class Runner:
    """Runs one graph, at one set of shapes, under one plan."""

    def __init__(
        self,
        *,
        graph: fx.Graph,
        attention: Attention,
        partition: Partition,
        schedule: Schedule,
        compiler: PieceCompiler,
        owner_position: int | None,
        clock_of: Callable[[object], Clock],
        strict: bool,
        written: tuple[int, ...] = (),
        company: Company | None = None,
        graphs: GraphMaker | None = None,
    ) -> None:
        self.attention, self.partition, self.schedule = attention, partition, schedule
        self.written = written
        self._compiler, self._strict = compiler, strict
        self._owner_position, self._clock_of = owner_position, clock_of
        self._company, self._make_graphs = company or Alone(), graphs
        self._sites = {site.path: site for site in attention.sites}
        self._shapes = {site.path: site.shape for site in attention.sites}
        self._kinds = {site.path: _kinds(site) for site in attention.sites}
        self._builder = ProgramBuilder(graph, partition, compiler)
        self._sessions: dict[int, tuple[weakref.ref[Any] | None, Session]] = {}
        self._timestep = TimestepReader(attention.inputs)
        self._rounding = _rounding(graph, attention.inputs.timestep)
        self._halves = schedule.calls_per_step == 1 and any(
            e.action.method.shares_cfg for row in schedule.rows for e in row
        )
        self._full: Program | None = None
        self.calls = 0
        self.programs = self._compile_programs()

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """One call of the denoiser with the graph's inputs; gives the graph's outputs."""
        self.calls += 1
        if self._company.broken and not self._sites and self.attention.inputs.timestep is None:
            return self._builder.run_program(self.programs[0], args, {})  # it may come before the timestep is known
        session = self._session(args)
        reading = self._timestep.begin(args)
        ahead = self._launch_ahead(session, args)
        try:
            call = self._tick(session, reading())
            self._begin(session, call, args)
        except (ClockError, CFGError) as error:
            session.abandon()
            if self._strict:
                raise
            return self._run_full(args, error)
        try:
            return self._run(call, args, session, ahead)
        except BaseException:
            session.abandon()
            raise

    def serves(self, owners: Collection[int], *, ownerless: bool = True) -> bool:
        """Whether it served a denoiser with one of these parameters (their ids), or perhaps one without any."""
        return any(ownerless if ref is None else key in owners for key, (ref, _) in self._sessions.items())

    def drop_state(self, owners: Collection[int]) -> None:
        """Free the state that the last generation left of the denoiser with one of these parameters (their ids)."""
        for key, (ref, session) in self._sessions.items():
            if ref is None or key in owners:
                session.state.clear()

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The sessions of the denoisers that are alive."""
        return tuple(s for ref, s in self._sessions.values() if ref is None or ref() is not None)

    @property
    def stats(self) -> RunnerStats:
        """Counts and sizes, now."""
        return RunnerStats(
            sites=tuple(self._sites),
            shapes=self._shapes,
            unique_blocks=len(self.partition.unique_blocks),
            segments=len(self.partition.segments),
            pieces=len(self._compiler.pieces),
            compile_seconds=self._compiler.seconds,
            state_bytes=sum(s.state_bytes for s in self.sessions),
            peak_state_bytes=max((s.peak_bytes for s in self.sessions), default=0),
            predicted_state_bytes=self.schedule.state_bytes(self._shapes),
            calls=self.calls,
        )

    def _compile_programs(self) -> tuple[Program, ...]:
        rows = [self.schedule.row(call) for call in range(self.schedule.calls)]
        self._builder.compile_rows(rows)
        return tuple(self._builder.program(row) for row in rows)

    def _session(self, args: Sequence[Any]) -> Session:
        owner = args[self._owner_position] if self._owner_position is not None else None
        key = id(owner)
        found = self._sessions.get(key)
        if found is not None and (found[0] is None or found[0]() is owner):
            return found[1]
        make = self._make_graphs
        graphs = None if make is None else make(self._builder, self.programs, self.schedule)
        session = Session(self._clock_of(owner), graphs=graphs)
        ref = None if owner is None else weakref.ref(owner, lambda _: self._sessions.pop(key, None))
        self._sessions[key] = (ref, session)
        return session

    def session_of(self, owner: object) -> Session | None:
        """The session of a denoiser, by the parameter that owns it."""
        found = self._sessions.get(id(owner))
        return None if found is None or (found[0] is not None and found[0]() is not owner) else found[1]

    def _launch_ahead(self, session: Session, args: Sequence[Any]) -> Launched | None:
        """Begin the call that comes next if the generation goes on, while its timestep is on the way to the host."""
        position = session.clock.position
        if session.graphs is None or self._company.broken or position < 0 or not session.ran(position):
            return None
        return session.graphs.launch(position + 1, args)

    def _tick(self, session: Session, timestep: float | None) -> int:
        """The number of this call, which was shown ``timestep``, in its generation.

        Where Dynamo broke the denoiser into several graphs, the one that reads the timestep moves the clock and the
        others follow.
        """
        clock = session.clock
        if not self._company.broken:
            return clock.tick(timestep, tolerance=self._rounding)
        if timestep is not None and (timestep != clock.timestep or session.ran(clock.position)):
            self._company.check_sites()
            return clock.tick(timestep, tolerance=self._rounding)
        if clock.position < 0 or session.ran(clock.position):
            raise ClockError(
                "the denoiser runs as several graphs, and the one that reads the timestep did not run before this one",
                where="step clock",
                got=f"graph with sites {', '.join(self._sites) or 'none'}",
                allowed="one graph with the timestep among its inputs, first in each call",
                todo="look for graph breaks with TORCH_LOGS=graph_breaks, and compile the whole denoiser",
            )
        return clock.position

    def _begin(self, session: Session, call: int, args: Sequence[Any]) -> None:
        """Make ``session`` ready for ``call``: begun, or with the state of the call before."""
        if call == 0:
            session.state.clear()
            if self._halves:
                self._check_halves(args)
            if session.graphs is not None:
                session.graphs.begin(call)
        elif self._sites and not session.ran(call - 1) and not self._take_over(session, call, args):
            raise ClockError(
                "there is no state to go on with in the middle of a generation",
                where=f"step {call // self.schedule.calls_per_step}",
                got="a call at a batch, resolution or dtype that did not run the generation's last step, "
                "or one after a call that failed",
                allowed="one shape from the first step to the last, and no failed call between; the batch may go from "
                "two halves of guidance to the conditional one",
                todo="begin a new generation, and keep the batch (and CFG) the same throughout it",
            )
        session.generation, session.position = session.clock.generation, call

    def _take_over(self, session: Session, call: int, args: Sequence[Any]) -> bool:
        """Take the state of the runner that served the call before, if it fits this one."""
        owner = args[self._owner_position] if self._owner_position is not None else None
        for other in self._company.runners:
            theirs = None if other is self else other.session_of(owner)
            if theirs is None or not theirs.ran(call - 1):
                continue
            fit = self._fit_from(other, call - 1)
            if fit is not None:
                session.state = {key: fit(key, value) for key, value in theirs.state.items()}
                if session.graphs is not None:
                    session.graphs.begin(call)
                    session.graphs.adopt(session.state)
                theirs.abandon()
                return True
        return False

    def _fit_from(self, other: Runner, call: int) -> Callable[[StateKey, Tensor], Tensor] | None:
        """How a tensor of another runner's state after ``call`` becomes one of this runner's; None if none can."""
        if other._kinds != self._kinds:
            return None
        if other._shapes == self._shapes and other.schedule == self.schedule:
            return lambda _, value: value
        doubled = {path: replace(shape, **_twice(shape)) for path, shape in self._shapes.items()}
        if other._shapes != doubled or self._halves or not self._company.guided:
            return None
        row, second = other.schedule.row(call), self._compiler.settings.second

        def conditional(key: StateKey, value: Tensor) -> Tensor:
            site, entry, residual = other._sites[key[0]], row[key[0]], key[1].startswith("residual")
            if entry.residual_half if residual else entry.output_half:
                return value
            axis = residual_axis(site) if residual else site.output_axes[output_number(key)]
            return cfg_half(value, axis=axis, second=second).contiguous()

        return conditional

    def _check_halves(self, args: Sequence[Any]) -> None:
        """A CFG batch holds the same latents twice; anything else must not share a half."""
        for position in self.attention.inputs.samples:
            first, second = args[position].chunk(2)
            if not torch.equal(first, second):
                raise CFGError(
                    "the plan shares the conditional half of the batch, but the two halves hold different latents",
                    where="first step of a generation",
                    got=f"a batch of {args[position].shape[0]} that is not the same latents twice",
                    allowed="latents repeated for the conditional and the unconditional half",
                    todo="turn classifier-free guidance on, or use a plan without '+cfg' methods",
                )

    def _run(self, call: int, args: Sequence[Any], session: Session, ahead: Launched | None) -> tuple[Any, ...]:
        if session.graphs is None:
            outputs = self._builder.run_program(self.programs[call], args, session.state)
        else:
            outputs = session.graphs.run(call, args, session.state, ahead)
        session.peak_bytes = max(session.peak_bytes, session.state_bytes)
        return outputs

    def _run_full(self, args: Sequence[Any], error: DifaError) -> tuple[Any, ...]:
        warnings.warn(f"difa_fx runs full attention: {error}", stacklevel=3)
        if self._full is None:
            row = {path: SiteStep(FULL) for path in self._sites}
            self._builder.compile_rows([row])
            self._full = self._builder.program(row)
        return self._builder.run_program(self._full, args, {})


def owners(model: nn.Module) -> Iterator[Tensor]:
    """What can own the clock and the state of a denoiser: its parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()


def _kinds(site: AttentionSite) -> list[tuple[torch.dtype, torch.device]]:
    """Dtype and device of each output, and of the residual."""
    values = [node.meta["val"] for node in (*site.outputs, site.call.q)]
    return [(value.dtype, value.device) for value in values]


def _twice(shape: SiteShape) -> dict[str, int]:
    """The sizes of a site at twice the batch."""
    sizes = ("batch", "projection_flops", "output_numel", "residual_numel")
    return {name: 2 * getattr(shape, name) for name in sizes}


def _rounding(graph: fx.Graph, timestep: int | None) -> float:
    """Relative spacing of the timestep's dtype; 0 for integers."""
    if timestep is None:
        return 0.0
    value = placeholders(graph)[timestep].meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return 0.0
    return float(torch.finfo(value.dtype).eps)
