"""The runner: a denoiser's call as a loop over pieces, with state that the schedule keeps alive no longer than needed.

Every value of a call has a slot: the graph's inputs first, then what the pieces yield.  A program lists, piece
by piece, the slots it reads and fills, the state it takes and leaves, and the slots that are dead after it.  A site
whose output is cached has no piece in a step's program: its slot is filled from the state.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from difa_fx.attention import cfg_half, cfg_shared
from difa_fx.clock import Clock
from difa_fx.compile import Piece, PieceCompiler
from difa_fx.cost import SiteShape
from difa_fx.errors import CFGError, ClockError, DifaError
from difa_fx.passes.find_attention import Attention, AttentionSite
from difa_fx.passes.graph_tools import output_values, placeholders
from difa_fx.passes.partition import Partition, Segment
from difa_fx.passes.rewrite import residual_axis
from difa_fx.schedule import FULL, Schedule, SiteAction, SiteStep

StateKey = tuple[str, str]
"""Path of a site, and ``output`` or ``residual``."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One segment in a program.

    A state that holds the conditional half alone is used for both halves of the batch, and of one that holds
    the whole batch a half step reads the conditional half.

    Attributes:
        run: the compiled piece; None when the segment's output is taken from the state.
        inputs: slots it reads.
        outputs: slots it fills.
        dead: slots that nothing reads after it.
        widen: axis along which its output, a half, is used for both halves.
        residual: the residual it reads.
        fit_residual: how the stored residual is fitted to the batch it computes, when that differs.
        stored: the output it takes from the state instead of running.
        keeps: the state its output becomes.
        writes: the residual it leaves.
        drops: state that nothing reads after it.
    """

    run: Piece | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dead: tuple[int, ...]
    widen: int | None = None
    residual: StateKey | None = None
    fit_residual: Callable[[Tensor], Tensor] | None = None
    stored: StateKey | None = None
    keeps: StateKey | None = None
    writes: StateKey | None = None
    drops: tuple[StateKey, ...] = ()


Program = tuple[Call, ...]


@dataclass(slots=True)
class Session:
    """The state of one denoiser's generation; two denoisers that share a compiled graph have one each."""

    clock: Clock
    state: dict[StateKey, Tensor] = field(default_factory=dict)
    generation: int = -1
    peak_bytes: int = 0

    def abandon(self) -> None:
        """Drop the state, and with it the generation: only the first step of a new one can follow."""
        self.state.clear()
        self.generation = -1

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
        peak_state_bytes: the most that one session held after a step.
        predicted_state_bytes: what the schedule says is held after each step.
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
    ) -> None:
        self.attention, self.partition, self.schedule = attention, partition, schedule
        self._compiler, self._strict = compiler, strict
        self._owner_position, self._clock_of = owner_position, clock_of
        self._sites = {site.path: site for site in attention.sites}
        self._shapes = {site.path: site.shape for site in attention.sites}
        self._slots = _slots(graph, partition)
        self._results = [_Slot(self._slots[v]) if isinstance(v, fx.Node) else v for v in output_values(graph)]
        self._layout = _layout(partition, self._slots, self._results)
        self._sessions: dict[int, tuple[weakref.ref[Any] | None, Session]] = {}
        self._rounding = _rounding(graph, attention.inputs.timestep)
        self._shares_cfg = any(e.action.method.shares_cfg for row in schedule.rows for e in row)
        self._full: Program | None = None
        self.calls = 0
        self.programs = self._compile_programs()

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """One call of the denoiser with the graph's inputs; gives the graph's outputs."""
        self.calls += 1
        session = self._session(args)
        try:
            step = session.clock.tick(self._timestep(args), tolerance=self._rounding)
            self._begin(session, step, args)
        except (ClockError, CFGError) as error:
            session.abandon()
            if self._strict:
                raise
            return self._run_full(args, error)
        try:
            return self._run(self.programs[step], args, session)
        except BaseException:
            session.abandon()
            raise

    def serves(self, owners: Collection[int]) -> bool:
        """Whether it served a denoiser with one of these parameters (their ids); a denoiser without any counts."""
        return any(ref is None or key in owners for key, (ref, _) in self._sessions.items())

    def drop_state(self, model: nn.Module) -> None:
        """Free the state that ``model``'s last generation left."""
        owned = {id(parameter) for parameter in model.parameters()}
        for key, (ref, session) in self._sessions.items():
            if ref is None or key in owned:
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
        rows = [self.schedule.row(step) for step in range(self.schedule.steps)]
        self._compiler.compile_all(v for row in rows for v in self._variants(row))
        return tuple(self._program(row) for row in rows)

    def _variants(self, row: Mapping[str, SiteStep]) -> Iterator[tuple[Segment, SiteAction | None]]:
        """The segments that run at a step, and what their sites do."""
        for segment in self.partition.segments:
            action = None if segment.site is None else row[segment.site.path].action
            if action is None or action.method.computes:
                yield segment, action

    def _program(self, row: Mapping[str, SiteStep]) -> Program:
        return tuple(
            self._call(segment, place, None if segment.site is None else row[segment.site.path])
            for segment, place in zip(self.partition.segments, self._layout, strict=True)
        )

    def _call(self, segment: Segment, place: _Place, entry: SiteStep | None) -> Call:
        slots = (place.inputs, place.outputs, place.dead)
        if segment.site is None or entry is None:
            return Call(self._compiler.piece(segment, None), *slots)
        site, action = segment.site, entry.action
        output, residual = (site.path, "output"), (site.path, "residual")
        computes = action.method.computes
        dropped = [(output, not computes and not entry.keeps_output)]
        dropped += [(residual, action.method.windowed and not entry.keeps_residual)]
        return Call(
            self._compiler.piece(segment, action) if computes else None,
            *slots,
            widen=site.axes[site.output] if entry.output_half else None,
            residual=residual if action.method.windowed else None,
            fit_residual=self._fit(site, entry),
            stored=None if computes else output,
            keeps=output if computes and entry.keeps_output else None,
            writes=residual if action.writes_residual else None,
            drops=tuple(key for key, drops in dropped if drops),
        )

    def _fit(self, site: AttentionSite, entry: SiteStep) -> Callable[[Tensor], Tensor] | None:
        wants_half = entry.action.method.shares_cfg
        if not entry.action.method.windowed or entry.residual_half == wants_half:
            return None
        axis, second = residual_axis(site), self._compiler.settings.second
        if wants_half:
            return lambda stored: cfg_half(stored, axis=axis, second=second).contiguous()
        return partial(cfg_shared, axis=axis)

    def _session(self, args: Sequence[Any]) -> Session:
        owner = args[self._owner_position] if self._owner_position is not None else None
        key = id(owner)
        found = self._sessions.get(key)
        if found is not None and (found[0] is None or found[0]() is owner):
            return found[1]
        session = Session(self._clock_of(owner))
        ref = None if owner is None else weakref.ref(owner, lambda _: self._sessions.pop(key, None))
        self._sessions[key] = (ref, session)
        return session

    def _timestep(self, args: Sequence[Any]) -> float | None:
        position = self.attention.inputs.timestep
        if position is None:
            return None
        value = args[position]
        return float(value.reshape(-1)[0]) if isinstance(value, Tensor) else float(value)

    def _begin(self, session: Session, step: int, args: Sequence[Any]) -> None:
        if step == 0:
            session.state.clear()
            session.generation = session.clock.generation
            if self._shares_cfg:
                self._check_halves(args)
        elif session.generation != session.clock.generation:
            raise ClockError(
                "there is no state to go on with in the middle of a generation",
                where=f"step {step}",
                got="a call at a batch, resolution or dtype that did not run this generation's first steps, "
                "or one after a call that failed",
                allowed="one shape from the first step to the last, and no failed call between",
                todo="begin a new generation, and keep the batch (and CFG) the same throughout it",
            )

    def _check_halves(self, args: Sequence[Any]) -> None:
        """A CFG batch holds the same latents twice; anything else must not share a half."""
        position = self.attention.inputs.latents
        latents = args[position] if position is not None else None
        if latents is None:
            return
        first, second = latents.chunk(2)
        if not torch.equal(first, second):
            raise CFGError(
                "the plan shares the conditional half of the batch, but the two halves hold different latents",
                where="first step of a generation",
                got=f"a batch of {latents.shape[0]} that is not the same latents twice",
                allowed="latents repeated for the conditional and the unconditional half",
                todo="turn classifier-free guidance on, or use a plan without '+cfg' methods",
            )

    def _run(self, program: Program, args: Sequence[Any], session: Session) -> tuple[Any, ...]:
        slots: list[Any] = [*args, *([None] * (len(self._slots) - len(args)))]
        state = session.state
        for call in program:
            if call.run is None:
                assert call.stored is not None
                results: Sequence[Any] = (state[call.stored],)
            else:
                values = [slots[i] for i in call.inputs]
                if call.residual is not None:
                    stored = state[call.residual]
                    values.append(stored if call.fit_residual is None else call.fit_residual(stored))
                results = call.run(values)
            if call.keeps is not None:
                state[call.keeps] = self._kept(results[0])
            if call.writes is not None:
                state[call.writes] = self._kept(results[-1])
            if call.widen is not None:
                results = (cfg_shared(results[0], axis=call.widen),)
            for slot, value in zip(call.outputs, results, strict=False):
                slots[slot] = value
            del results
            for key in call.drops:
                del state[key]
            for slot in call.dead:
                slots[slot] = None
        session.peak_bytes = max(session.peak_bytes, session.state_bytes)
        return self._collect(slots)

    def _kept(self, value: Tensor) -> Tensor:
        """``value`` as state: a CUDA graph's next replay overwrites its outputs, so of those a copy is kept."""
        return value.clone() if value.is_cuda and self._compiler.patches.get("triton.cudagraphs") else value

    def _collect(self, slots: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(slots[result.slot] if isinstance(result, _Slot) else result for result in self._results)

    def _run_full(self, args: Sequence[Any], error: DifaError) -> tuple[Any, ...]:
        warnings.warn(f"difa_fx runs full attention: {error}", stacklevel=3)
        if self._full is None:
            row = {path: SiteStep(FULL) for path in self._sites}
            self._compiler.compile_all(self._variants(row))
            self._full = self._program(row)
        return self._run(self._full, args, Session(Clock(1)))


@dataclass(frozen=True, slots=True)
class _Slot:
    """A result of the graph that is a value, not a constant."""

    slot: int


@dataclass(frozen=True, slots=True)
class _Place:
    """The slots of one segment."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dead: tuple[int, ...]


def _slots(graph: fx.Graph, partition: Partition) -> dict[fx.Node, int]:
    """A slot for each input of the graph, in order, and for each value that crosses segments."""
    nodes = [*placeholders(graph), *(n for s in partition.segments for n in s.outputs)]
    return {node: slot for slot, node in enumerate(nodes)}


def _layout(partition: Partition, slots: Mapping[fx.Node, int], results: Sequence[Any]) -> tuple[_Place, ...]:
    last = {node: i for i, segment in enumerate(partition.segments) for node in segment.inputs}
    kept = {result.slot for result in results if isinstance(result, _Slot)}
    return tuple(
        _Place(
            tuple(slots[node] for node in segment.inputs),
            tuple(slots[node] for node in segment.outputs),
            tuple(slots[n] for n in segment.inputs if last[n] == i and slots[n] not in kept),
        )
        for i, segment in enumerate(partition.segments)
    )


def _rounding(graph: fx.Graph, timestep: int | None) -> float:
    """Relative spacing of the timestep's dtype; 0 for integers."""
    if timestep is None:
        return 0.0
    value = placeholders(graph)[timestep].meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return 0.0
    return float(torch.finfo(value.dtype).eps)
