"""Programs: a denoiser's call as a list of pieces, with the values and the state that each reads and leaves.

Every value of a call has a slot: the graph's inputs first, then what the pieces yield.  A program lists, piece
by piece, the slots it reads and fills, the state it takes and leaves, and the slots that are dead after it.  A site
whose output is cached has no piece in a step's program: its slot is filled from the state, and what a trunk computes
for that site alone is not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from torch import Tensor, fx

from difa_fx.attention import cfg_half, cfg_shared
from difa_fx.compile import Piece, PieceCompiler
from difa_fx.crossings import Crossings
from difa_fx.passes.autocast import without_autocast
from difa_fx.passes.graph_tools import output_values, placeholders
from difa_fx.passes.partition import Partition
from difa_fx.passes.rewrite import Variant, residual_axis
from difa_fx.passes.sites import AttentionSite
from difa_fx.schedule import SiteStep

StateKey = tuple[str, str]
"""Path of a site, and what of it: ``output``, ``output 1`` (a joint attention's second), ``residual``; with the number
of the call where a step has two, and ``handed`` for what the first of them hands to the second."""

State = dict[StateKey, Tensor]


def output_keys(path: str, count: int, owner: str = "") -> tuple[StateKey, ...]:
    """The state of a site's outputs; ``owner``: which call of a step, or ``handed``."""
    return tuple((path, " ".join(filter(None, ("output", str(i) if i else "", owner)))) for i in range(count))


def output_number(key: StateKey) -> int:
    """Which of a site's outputs ``key`` is of."""
    _, *rest = key[1].split()
    return int(rest[0]) if rest and rest[0].isdigit() else 0


def residual_key(path: str, owner: str = "") -> StateKey:
    """The state of a site's residual."""
    return path, " ".join(filter(None, ("residual", owner)))


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One segment in a program.

    A state that holds the conditional half alone is used for both halves of the batch, and of one that holds
    the whole batch a half step reads the conditional half.

    Attributes:
        run: the compiled piece; None when the segment's output is taken from the state, or read by nothing.
        inputs: slots it reads; none when nothing runs.
        outputs: slots it fills.
        dead: slots that nothing reads after it.
        widen: for each output that is a half and cannot stay one, the axis of the batch, else None; may be empty.
        residual: the residual it reads.
        fit_residual: how the stored residual is fitted to the batch it computes, when that differs.
        stored: the outputs it takes from the state instead of running.
        keeps: the state its outputs become.
        hands: the state in which its outputs wait for the step's other call.
        writes: the states its residual becomes.
        moves: state that it renames, from and to.
        drops: state that nothing reads after it.
    """

    run: Piece | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dead: tuple[int, ...]
    widen: tuple[int | None, ...] = ()
    residual: StateKey | None = None
    fit_residual: Callable[[Tensor], Tensor] | None = None
    stored: tuple[StateKey, ...] = ()
    keeps: tuple[StateKey, ...] = ()
    hands: tuple[StateKey, ...] = ()
    writes: tuple[StateKey, ...] = ()
    moves: tuple[tuple[StateKey, StateKey], ...] = ()
    drops: tuple[StateKey, ...] = ()


Program = tuple[Call, ...]

_HANDED: Final = "handed"
_WHOLE: Final = Variant()


class ProgramBuilder:
    """Makes and runs the programs of one partitioned graph.

    Attributes:
        partition: the segments.
        compiler: where the pieces come from.
    """

    def __init__(self, graph: fx.Graph, partition: Partition, compiler: PieceCompiler) -> None:
        self.partition, self.compiler = partition, compiler
        slots = _slots(graph, partition)
        self._size, self._crossings = len(slots), Crossings(partition)
        self._results = [_Slot(slots[v]) if isinstance(v, fx.Node) else v for v in output_values(graph)]
        self._layout = _layout(partition, slots, self._results)

    def compile_rows(self, rows: Iterable[Mapping[str, SiteStep]]) -> None:
        """Compile what the steps of ``rows`` (site to what it does) need and is not there yet."""
        segments = self.partition.segments
        self.compiler.compile_all(
            (segment, variant)
            for row in rows
            for segment, variant in zip(segments, self._crossings.variants(row), strict=True)
            if variant is not None
        )

    def program(self, row: Mapping[str, SiteStep]) -> Program:
        """The program of one step, whose pieces :meth:`compile_rows` has made."""
        variants = self._crossings.variants(row)
        return tuple(
            self.call(index, None if segment.site is None else row[segment.site.path], variant, halves=True)
            for index, (segment, variant) in enumerate(zip(self.partition.segments, variants, strict=True))
        )

    def call(
        self, index: int, entry: SiteStep | None, variant: Variant | None = _WHOLE, *, halves: bool = False
    ) -> Call:
        """Segment number ``index`` as a call.

        Args:
            index: which.
            entry: what its site does; None for a trunk.
            variant: of a trunk; None when nothing reads what it yields.
            halves: whether trunks take halves that stand for both, as :meth:`program` has them.
        """
        segment, place = self.partition.segments[index], self._layout[index]
        if segment.site is None or entry is None:
            if variant is None:
                return Call(None, (), (), place.dead)
            read = tuple(slot for i, slot in enumerate(place.outputs) if i not in variant.unread)
            return Call(self.compiler.piece(segment, variant), place.inputs, read, place.dead)
        site, action = segment.site, entry.action
        count, owner = len(segment.outputs), "of call 2" if entry.branch else ""
        outputs, residual = output_keys(site.path, count, owner), residual_key(site.path, owner)
        handed, handed_residual = output_keys(site.path, count, _HANDED), residual_key(site.path, _HANDED)
        stored = () if entry.runs else handed if entry.takes else outputs
        drops = handed if entry.takes else () if entry.runs or entry.keeps_output else outputs
        if entry.runs and action.method.windowed and not entry.keeps_residual:
            drops = (*drops, residual)
        written = {residual: entry.keeps_residual, handed_residual: entry.hands_residual}
        return Call(
            self.compiler.piece(segment, Variant(action)) if entry.runs else None,
            place.inputs if entry.runs else (),
            place.outputs,
            place.dead,
            widen=self._widened(index, halves) if entry.output_half else (),
            residual=residual if entry.runs and action.method.windowed else None,
            fit_residual=self._fit(site, entry),
            stored=stored,
            keeps=outputs if entry.keeps_output and stored != outputs else (),
            hands=handed if entry.hands else (),
            writes=tuple(key for key, wanted in written.items() if wanted) if action.writes_residual else (),
            moves=((handed_residual, residual),) if entry.takes_residual else (),
            drops=drops,
        )

    def run_program(self, program: Program, args: Sequence[Any], state: State) -> tuple[Any, ...]:
        """The graph's outputs for its inputs; ``state`` is changed."""
        slots = self.start(args)
        self.run(program, slots, state)
        return self.collect(slots)

    def start(self, args: Sequence[Any]) -> list[Any]:
        """The slots at the beginning of a call with the graph's inputs."""
        return [*args, *([None] * (self._size - len(args)))]

    @without_autocast()
    def run(self, calls: Iterable[Call], slots: list[Any], state: State) -> None:
        """Run ``calls`` in order; ``slots`` and ``state`` are changed."""
        for call in calls:
            values = [slots[i] for i in call.inputs]
            for slot in call.dead:  # the piece has it alone now, and frees it once it is read
                slots[slot] = None
            results = _results(call, values, state)
            del values
            for key, value in _state_of(call, results):
                state[key] = value
            for waiting, key in call.moves:
                state[key] = state.pop(waiting)
            if call.widen:
                results = [_both(half, axis) for half, axis in zip(results, call.widen, strict=False)]
            for slot, value in zip(call.outputs, results, strict=False):
                slots[slot] = value
            del results
            for key in call.drops:
                del state[key]

    def collect(self, slots: Sequence[Any]) -> tuple[Any, ...]:
        """The graph's outputs, after its last segment ran."""
        return tuple(slots[result.slot] if isinstance(result, _Slot) else result for result in self._results)

    def _widened(self, index: int, halves: bool) -> tuple[int | None, ...]:
        return self._crossings.widened(index) if halves else self._crossings.axes(index)

    def _fit(self, site: AttentionSite, entry: SiteStep) -> Callable[[Tensor], Tensor] | None:
        wants_half = entry.action.method.shares_cfg
        if not entry.action.method.windowed or entry.residual_half == wants_half:
            return None
        axis, second = residual_axis(site), self.compiler.settings.second
        if wants_half:
            return lambda stored: cfg_half(stored, axis=axis, second=second).contiguous()
        return partial(cfg_shared, axis=axis)


def _results(call: Call, values: list[Any], state: State) -> Sequence[Any]:
    """What a call's piece yields for its inputs, or the state that stands for it."""
    if call.run is None:
        return [state[key] for key in call.stored]
    if call.residual is not None:
        stored = state[call.residual]
        values.append(stored if call.fit_residual is None else call.fit_residual(stored))
    return call.run(values)


def _both(half: Tensor, axis: int | None) -> Tensor:
    return half if axis is None else cfg_shared(half, axis=axis)


def _state_of(call: Call, results: Sequence[Any]) -> Iterator[tuple[StateKey, Tensor]]:
    """The state that a call leaves."""
    yield from zip(call.keeps, results, strict=False)
    yield from zip(call.hands, results, strict=False)
    for key in call.writes:
        yield key, results[-1]


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
