"""The runner: which call of a generation this is, whose state it goes on with, and the program that runs then.

A denoiser may have several runners: one for each batch and resolution it is called with, and one for each graph where
Dynamo breaks it into several.  State belongs to a runner; one that serves the next call of a generation takes it over
from the one before if it fits, or if the batch went from two halves of guidance to the conditional one alone.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from difa_fx._torch import WeakIdKeyDictionary
from difa_fx.boundary import unforeseen_is_typed
from difa_fx.cfg_halves import check_halves
from difa_fx.clock import Clock
from difa_fx.compile import PieceCompiler
from difa_fx.cuda_graphs import GraphMaker, Launched
from difa_fx.errors import CFGError, ClockError, DifaError
from difa_fx.generation_line import Told
from difa_fx.handover import fit_from, kinds_of
from difa_fx.passes.find_attention import Attention
from difa_fx.passes.graph_tools import placeholders
from difa_fx.passes.inputs import DenoiserInputs
from difa_fx.passes.partition import Partition
from difa_fx.program import Program, ProgramBuilder, State
from difa_fx.runner_context import Alone, ClockSource, Company
from difa_fx.schedule import FULL, Schedule, SiteStep
from difa_fx.sessions import RunnerStats, Session
from difa_fx.timestep import TimestepReader, grid_of
from difa_fx.witness import Seen


class _Served(threading.local):
    """How many calls of graphs with sites this thread made."""

    calls = 0


served = _Served()
"""Whoever calls a denoiser can tell by it whether sites ran."""


class Runner:
    """Runs one graph, at one set of shapes, under one plan.

    Args:
        unguided: makes the runner of the same graph for a generation whose guidance has ended, so that the batch is
            the conditional half alone; None where guidance cannot end.
        only_going_on: why no generation can begin here; one whose guidance has ended can go on.
    """

    def __init__(
        self,
        *,
        graph: fx.Graph,
        attention: Attention,
        partition: Partition,
        schedule: Schedule,
        compiler: PieceCompiler,
        owner_position: int | None,
        clocks: ClockSource,
        strict: bool,
        later: Callable[[int], Schedule] | None = None,
        names: Sequence[str] = (),
        written: tuple[int, ...] = (),
        company: Company | None = None,
        graphs: GraphMaker | None = None,
        unguided: Callable[[], Runner] | None = None,
        only_going_on: DifaError | None = None,
    ) -> None:
        self.attention, self.partition, self.schedule = attention, partition, schedule
        self.written = written
        self.compiler, self._strict = compiler, strict
        self._owner_position, self._clocks = owner_position, clocks
        self.company, self._make_graphs = company or Alone(), graphs
        self.sites_by_path = {site.path: site for site in attention.sites}
        self.shapes = {site.path: site.shape for site in attention.sites}
        self.kinds = {site.path: kinds_of(site) for site in attention.sites}
        self._builder = ProgramBuilder(graph, partition, compiler)
        self._sessions: list[weakref.ref[Session]] = []
        self._served, self._served_ownerless = WeakIdKeyDictionary(), False
        self._timestep = TimestepReader(attention.inputs)
        self._grid = grid_of(_timestep_dtype(graph, attention.inputs.timestep))
        self._conditions = _conditions(names, attention.inputs)
        self._full: Program | None = None
        self._warned = False
        self._unguided, self._only_going_on = unguided, only_going_on
        self._without_guidance: Runner | None = None
        self._lock = threading.RLock()
        self._own: dict[tuple[int, int], tuple[int, ...]] = {}
        self._later, self._parts = later, dict[int, tuple[Schedule, tuple[Program, ...]]]()
        self.calls = 0
        self._programs: tuple[Program, ...] | None = None

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """One call of the denoiser with the graph's inputs; gives the graph's outputs."""
        if self.sites_by_path:
            served.calls += 1
        if self.company.broken and not self.sites_by_path and self.attention.inputs.timestep is None:
            self._note(self._owner(args))
            return self._builder.run_program(self.programs[0], args, {})  # it may come before the timestep is known
        owner = self._owner(args)
        reading = self._timestep.begin(args)
        begun, ahead = self._launch_ahead(owner, args)
        session = begun
        try:
            clock = self._clock(owner, args, reading())
            runner = self._serving(clock)
            runner._note(owner)
            session = runner._session(clock)
            if begun is not None and begun is not session:
                begun.abandon()  # its graph wrote over what it held
            runner._begin(session, args)
        except (ClockError, CFGError) as error:
            self._note(owner, calls=0)
            self._clocks.abandon(owner)
            if session is not None:
                session.abandon()
            if self._strict:
                raise
            return self._run_full(args, error)
        try:
            return runner._run(args, session, ahead if runner is self else None)
        except BaseException:
            session.abandon()
            raise

    def serves(self, owners: Collection[int], *, ownerless: bool = True) -> bool:
        """Whether it served a denoiser with one of these parameters (their ids), or perhaps one without any."""
        served = (id(owner) in owners for owner in self._served)
        return any(served) or (self._served_ownerless and ownerless)

    @property
    def programs(self) -> tuple[Program, ...]:
        """A program a call of a whole generation; its pieces are compiled when they are first asked for."""
        if self._programs is None:
            with self._lock:
                if self._programs is None:  # no other thread has compiled them meanwhile
                    self._programs = self._compiled(self.schedule)
        return self._programs

    @programs.setter
    def programs(self, programs: tuple[Program, ...]) -> None:
        self._programs = programs

    def compile(self) -> None:
        """Compile what a whole generation runs."""
        assert self.programs is not None

    def _note(self, owner: object, calls: int = 1) -> None:
        """It serves the denoiser with ``owner``."""
        self.calls += calls
        if owner is None:
            self._served_ownerless = True
        else:
            self._served[owner] = True

    def drop(self, clock: Clock) -> None:
        """Free the state that ``clock``'s generation left."""
        for session in self.sessions:
            if session.of() is clock:
                session.abandon()

    @property
    def sessions(self) -> tuple[Session, ...]:
        """One for each clock that it served and that is alive."""
        found = tuple(session for ref in list(self._sessions) if (session := ref()) is not None)
        if len(found) < len(self._sessions):
            self._sessions = [ref for ref in self._sessions if ref() is not None]
        return found

    @property
    def stats(self) -> RunnerStats:
        """Counts and sizes, now."""
        return RunnerStats(
            sites=tuple(self.sites_by_path),
            shapes=self.shapes,
            unique_blocks=len(self.partition.unique_blocks),
            segments=len(self.partition.segments),
            pieces=len(self.compiler.pieces),
            compile_seconds=self.compiler.seconds,
            state_bytes=sum(s.state_bytes for s in self.sessions),
            peak_state_bytes=max((s.peak_bytes for s in self.sessions), default=0),
            predicted_state_bytes=self.schedule.state_bytes(self.shapes),
            calls=self.calls,
        )

    def _compiled(self, schedule: Schedule) -> tuple[Program, ...]:
        rows = [schedule.row(call) for call in range(schedule.calls)]
        with unforeseen_is_typed("compilation of the denoiser's pieces"):
            self._builder.compile_rows(rows)
            return tuple(self._builder.program(row) for row in rows)

    def part(self, first: int) -> tuple[Schedule, tuple[Program, ...]]:
        """What a generation runs that begins at the plan's step ``first``."""
        if not first or self._later is None:
            return self.schedule, self.programs
        with self._lock:
            if first not in self._parts:
                schedule = self._later(first)
                self._parts[first] = schedule, self._compiled(schedule)
            return self._parts[first]

    def _owner(self, args: Sequence[Any]) -> Any:
        return args[self._owner_position] if self._owner_position is not None else None

    def _session(self, clock: Clock) -> Session:
        """What it holds of the generations that ``clock`` counts."""
        found = self.session_of(clock)
        if found is None:
            make = self._make_graphs
            graphs = None if make is None else make(self._builder, self.programs, self.schedule)
            found = Session(weakref.ref(clock), graphs=graphs)
            clock.sessions[self] = found
            self._sessions.append(weakref.ref(found))
        return found

    def session_of(self, clock: Clock) -> Session | None:
        """The session of ``clock``, if there is one."""
        found = clock.sessions.get(self)
        assert found is None or isinstance(found, Session)
        return found

    def _launch_ahead(self, owner: object, args: Sequence[Any]) -> tuple[Session | None, Launched | None]:
        """Begin the call that comes next if the generation goes on, while its timestep is on the way to the host."""
        clock = None if self._make_graphs is None or self.company.broken else self._clocks.latest(owner)
        session = None if clock is None else self.session_of(clock)
        if clock is None or session is None or session.graphs is None or clock.first or not clock.running:
            return None, None
        if not session.ran(clock.position):
            return None, None
        return session, session.graphs.launch(clock.position + 1, args)

    def _clock(self, owner: object, args: Sequence[Any], timestep: float | None) -> Clock:
        """The clock of the generation that a call belongs to, moved on to it.

        Where Dynamo broke the denoiser into several graphs, the one that reads the timestep moves the clock and the
        others follow.
        """
        told = Told(timestep, self._grid, lambda: self._seen(args))
        if not self.company.broken:
            return self._clocks.tick(owner, told)
        followed = self.company.followed()
        if followed is not None and not self._ran(followed) and timestep in (None, followed.timestep):
            self.company.join(owner, followed)
            return followed
        if timestep is None:
            raise ClockError(
                "the denoiser runs as several graphs, and the one that reads the timestep did not run before this one",
                where="step clock",
                got=f"graph with sites {', '.join(self.sites_by_path) or 'none'}",
                allowed="one graph with the timestep among its inputs, first in each call",
                todo="look for graph breaks with TORCH_LOGS=graph_breaks, and compile the whole denoiser",
            )
        if followed is not None:
            self.company.check_sites()
        clock = self._clocks.tick(owner, told)
        self.company.follow(clock)
        return clock

    def _ran(self, clock: Clock) -> bool:
        session = self.session_of(clock)
        return session is not None and session.ran(clock.position)

    def _seen(self, args: Sequence[Any]) -> Seen:
        if self.company.broken:
            return Seen()  # what one graph of several is given may come from another
        latents = self.attention.inputs.latents
        conditions = {name: args[position] for name, position in self._conditions.items()}
        found = {name: value for name, value in conditions.items() if isinstance(value, Tensor)}
        return Seen(None if latents is None else args[latents], found)

    def _serving(self, clock: Clock) -> Runner:
        """This runner, or the one for a generation that went on from twice the batch, its guidance ended."""
        if self._unguided is None or clock.position <= 0 or self._ran_before(clock):
            return self
        batch = self.attention.inputs.batch
        known = self._without_guidance
        if known is not None and known._ran_before(clock):
            return known
        doubled = (r for r in self.company.runners if batch and r.attention.inputs.batch == 2 * batch)
        if not any(runner._ran_before(clock) for runner in doubled):
            return self
        with self._lock:
            if self._without_guidance is None:
                self._without_guidance = self._unguided()
        return self._without_guidance

    def _ran_before(self, clock: Clock) -> bool:
        session = self.session_of(clock)
        return session is not None and session.ran(clock.position - 1)

    def _begin(self, session: Session, args: Sequence[Any]) -> None:
        """Make ``session`` ready for the call that its clock counted: begun, or with the state of the call before."""
        clock = session.clock
        call = clock.position
        if call == 0:
            if self._only_going_on is not None:
                raise self._only_going_on
            session.abandon()
            self._warned = False
            if session.graphs is not None and not clock.first:
                session.graphs.begin(call)
        elif self.sites_by_path and not session.ran(call - 1) and not self._take_over(session, args):
            raise ClockError(
                "there is no state to go on with in the middle of a generation",
                where=f"step {clock.step}",
                got="a call at a batch, resolution or dtype that did not run the generation's last step, "
                "or one after a call that failed",
                allowed="one shape from the first step to the last, and no failed call between; the batch may go from "
                "two halves of guidance to the conditional one",
                todo="begin a new generation, and keep the batch (and CFG) the same throughout it",
            )
        check_halves(session, self.part(clock.first)[0], [args[position] for position in self.attention.inputs.given])
        session.generation, session.position = clock.generation, call

    def _take_over(self, session: Session, args: Sequence[Any]) -> bool:
        """Take the state of the runner that served the call before, if it fits this one."""
        clock = session.clock
        for other in self.company.runners:
            theirs = None if other is self else other.session_of(clock)
            if theirs is None or not theirs.ran(clock.position - 1):
                continue
            fit = fit_from(self, other, clock)
            if fit is not None:
                session.state = {key: fit(key, value) for key, value in theirs.state.items()}
                if session.graphs is not None:
                    session.graphs.begin(clock.position)
                    session.graphs.adopt(session.state)
                theirs.abandon()
                return True
        return False

    def _run(self, args: Sequence[Any], session: Session, ahead: Launched | None) -> tuple[Any, ...]:
        clock = session.clock
        _, programs = self.part(clock.first)
        if session.graphs is None or clock.first:
            outputs = self._builder.run_program(programs[clock.position], args, session.state)
            outputs = self._apart(outputs, session.state, (clock.first, clock.position))
        else:
            outputs = session.graphs.run(clock.position, args, session.state, ahead)
        session.peak_bytes = max(session.peak_bytes, session.state_bytes)
        return outputs

    def _apart(self, outputs: tuple[Any, ...], state: State, key: tuple[int, int]) -> tuple[Any, ...]:
        """``outputs``, copied where they lie in the state's memory: they are the caller's to write to."""
        shared = self._own.get(key)
        if shared is None:
            held = {value.untyped_storage().data_ptr() for value in state.values()}
            shared = tuple(
                number
                for number, value in enumerate(outputs)
                if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in held
            )
            self._own[key] = shared
        if not shared:
            return outputs
        return tuple(value.clone() if number in shared else value for number, value in enumerate(outputs))

    def _run_full(self, args: Sequence[Any], error: DifaError) -> tuple[Any, ...]:
        if not self._warned:
            self._warned = True
            warnings.warn(f"difa_fx runs full attention: {error}", stacklevel=3)
        with self._lock:
            if self._full is None:
                row = {path: SiteStep(FULL) for path in self.sites_by_path}
                self._builder.compile_rows([row])
                self._full = self._builder.program(row)
        return self._builder.run_program(self._full, args, {})


def owners(model: nn.Module) -> Iterator[Tensor]:
    """What can own the clock and the state of a denoiser: its parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()


def _timestep_dtype(graph: fx.Graph, timestep: int | None) -> torch.dtype | None:
    value = None if timestep is None else placeholders(graph)[timestep].meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def _conditions(names: Sequence[str], inputs: DenoiserInputs) -> dict[str, int]:
    """Positions of the inputs that may stay the same throughout a generation; ``names`` has "" for weights."""
    known = (*inputs.samples, inputs.timestep)
    return {name: position for position, name in enumerate(names) if name and position not in known}
