"""A denoiser's calls as CUDA graphs: each call of a generation is one graph, from the first piece to the last.

Pieces are pure functions of the graph's inputs and of the state, and the schedule is static.  So the calls of a
generation can be recorded in the order in which they run, all in one memory pool: the state that a call leaves stays
where it was made, the graphs of later calls read it there, and once nothing reads it the pool gives its memory to what
comes next.  State is never copied, and there is no more of it than the schedule says.

The first generation runs piece by piece, which warms kernels up.  The second is recorded, later ones replay.  A
generation that comes further than the recorded ones runs its rest piece by piece, and the next one is recorded anew.
Calls that do the same with the same state in the same place share a graph.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from difa_fx._torch import copy_all, same_addresses
from difa_fx.cuda_recorder import CudaRecorder, Recorder
from difa_fx.program import Program, ProgramBuilder, State, StateKey
from difa_fx.schedule import Schedule


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """One call as a graph.

    Attributes:
        call: which.
        replay: runs it.
        outputs: the denoiser's outputs, overwritten by every replay.
        before: where the state lies that it may not overwrite.
        state: what is held after it.
        shareable: a later call does the same, so ``state`` owns its memory, and no other call is recorded there.
    """

    call: int
    replay: Callable[[], None]
    outputs: tuple[Any, ...]
    before: Mapping[StateKey, int]
    state: State
    shareable: bool


@dataclass(frozen=True, slots=True, eq=False)
class Launched:
    """A call that was begun before it was known to be the next.

    Attributes:
        recorded: its graph.
        outputs: the caller's.
    """

    recorded: Recorded
    outputs: tuple[Any, ...]


class _Phase(enum.Enum):
    PIECES = enum.auto()
    RECORD = enum.auto()
    REPLAY = enum.auto()


class StepGraphs:
    """The graphs of one session's calls.

    Args:
        builder: runs programs.
        programs: a program a call.
        schedule: says which calls do the same.
        fixed: positions of the inputs that stay where they are, parameters and buffers.
        recorder: makes a recorder with an empty pool.
    """

    def __init__(
        self,
        builder: ProgramBuilder,
        programs: Sequence[Program],
        schedule: Schedule,
        *,
        fixed: Collection[int],
        recorder: Callable[[], Recorder],
    ) -> None:
        self._builder, self._programs, self._rows = builder, programs, schedule.rows
        self._fixed, self._make_recorder = sorted(fixed), recorder
        self._recorder: Recorder | None = None
        self._recorded: dict[int, Recorded] = {}
        self._phase = _Phase.PIECES
        self._first = self._reached = 0
        self._warm: set[int] = set()
        self._inputs: dict[int, Tensor] = {}
        self._addresses: list[int | None] = []
        self._adopted: State = {}

    @property
    def recorded(self) -> tuple[int, ...]:
        """The calls that are graphs; those that share one have the same number."""
        return tuple(recorded.call for recorded in self._recorded.values())

    def begin(self, call: int) -> None:
        """Another generation begins, or comes from another runner, with ``call``."""
        if call != self._first:
            self._forget()
            self._first = self._reached = call
        if len(self._recorded) == self._reached - self._first:
            self._phase = _Phase.REPLAY if self._recorded else _Phase.PIECES
            return
        self._forget()
        self._recorder = self._make_recorder()
        self._phase = _Phase.RECORD

    def adopt(self, state: State) -> None:
        """Put state that another runner made to where the graphs read it."""
        for key, value in state.items():
            if key not in self._adopted:
                self._forget()
                self._adopted[key] = _place_like(value)
            state[key] = self._adopted[key].copy_(value)

    def launch(self, call: int, args: Sequence[Any]) -> Launched | None:
        """Begin ``call``, if its graph is there, before it is known to be the next; to be given to :meth:`run`.

        Where it is not, what the graph has overwritten is of use to no one: another call cannot follow in this
        generation, and the first of a new one reads no state.
        """
        recorded = self._recorded.get(call)
        if self._phase is not _Phase.REPLAY or recorded is None or not self._at_home(args):
            return None
        self._fill(args)
        return Launched(recorded, _replayed(recorded))

    def run(self, call: int, args: Sequence[Any], state: State, ahead: Launched | None = None) -> tuple[Any, ...]:
        """One call; ``state`` is changed.  The outputs are the caller's to keep.

        Args:
            call: its number.
            args: the graph's inputs.
            state: what is held.
            ahead: what was begun already, perhaps of another call.
        """
        self._reached = max(self._reached, call + 1)
        if ahead is not None and ahead.recorded is self._recorded.get(call):
            _hold(state, ahead.recorded)
            return ahead.outputs
        if self._phase is not _Phase.PIECES and not self._at_home(args):
            for key, value in state.items():
                state[key] = value.clone()
            self._forget()
        if self._phase is _Phase.RECORD and not self._is_warm(call):
            self._phase = _Phase.PIECES
        if self._phase is _Phase.REPLAY and call not in self._recorded:
            self._phase = _Phase.PIECES
        if self._phase is _Phase.PIECES:
            return self._run_pieces(call, args, state)
        self._fill(args)
        recorded, fresh = self._recorded.get(call) or self._shared(call, state), False
        if recorded is None:
            try:
                recorded, fresh = self._record(call, args, state), True
            except BaseException:
                self._forget()
                raise
        self._recorded[call] = recorded
        outputs = _replayed(recorded)
        if not fresh:
            _hold(state, recorded)
        return outputs

    def _record(self, call: int, args: Sequence[Any], state: State) -> Recorded:
        """Record ``call``; ``state`` owns what it holds, so that nothing recorded while it lives takes its place."""
        assert self._recorder is not None
        before = _places(state)
        inputs = [self._inputs.get(position, value) for position, value in enumerate(args)]

        replay, outputs = self._recorder.record(lambda: self._builder.run_program(self._programs[call], inputs, state))
        unowned = self._recorder.unowned
        again = self._rows[call] in self._rows[call + 1 :]
        return Recorded(
            call=call,
            replay=replay,
            outputs=tuple(unowned(value) if isinstance(value, Tensor) else value for value in outputs),
            before=before,
            state=dict(state) if again else {key: unowned(value) for key, value in state.items()},
            shareable=again,
        )

    def _shared(self, call: int, state: State) -> Recorded | None:
        """A graph recorded before that does just what ``call`` does, with the state in the same place."""
        before = _places(state)
        return next(
            (
                recorded
                for recorded in self._recorded.values()
                if recorded.shareable and self._rows[recorded.call] == self._rows[call] and recorded.before == before
            ),
            None,
        )

    def _run_pieces(self, call: int, args: Sequence[Any], state: State) -> tuple[Any, ...]:
        program = self._programs[call]
        outputs = self._builder.run_program(program, args, state)
        self._warm.update(id(part.run) for part in program)
        return outputs

    def _is_warm(self, call: int) -> bool:
        return all(part.run is None or id(part.run) in self._warm for part in self._programs[call])

    def _at_home(self, args: Sequence[Any]) -> bool:
        """Whether parameters and buffers are where they were when the first graph was recorded."""
        if not self._recorded:
            fixed = set(self._fixed)
            self._addresses = [value.data_ptr() if i in fixed else None for i, value in enumerate(args)]
        return same_addresses(args, self._addresses, self._fixed)

    def _fill(self, args: Sequence[Any]) -> None:
        """Put the inputs where the graphs read them."""
        if not self._inputs:
            moving = set(range(len(args))) - set(self._fixed)
            self._inputs = {i: _place_like(args[i]) for i in sorted(moving) if isinstance(args[i], Tensor)}
        places = self._inputs.items()
        copy_all([_once(place) for _, place in places], [_once(args[position]) for position, _ in places])

    def _forget(self) -> None:
        self._recorded.clear()
        self._recorder = None
        self._phase = _Phase.PIECES


def _replayed(recorded: Recorded) -> tuple[Any, ...]:
    recorded.replay()
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in recorded.outputs)


def _hold(state: State, recorded: Recorded) -> None:
    state.clear()
    state.update(recorded.state)


GraphMaker = Callable[[ProgramBuilder, Sequence[Program], Schedule], StepGraphs]
"""Makes a session's graphs from what :class:`StepGraphs` takes first."""


def graphs_for(inputs: Sequence[Any], fixed: Collection[int]) -> GraphMaker | None:
    """Makes the graphs of calls with such inputs; None, after a warning, where CUDA graphs cannot be.

    Args:
        inputs: a call's.
        fixed: positions of parameters and buffers.
    """
    devices = {value.device for value in inputs if isinstance(value, Tensor)}
    (device, *others) = devices
    if device.type == "cuda" and not others:
        return partial(StepGraphs, fixed=fixed, recorder=partial(CudaRecorder, device))
    if any(found.type == "cuda" for found in devices):
        warnings.warn(
            f"difa_fx runs without CUDA graphs: the denoiser's inputs are on {', '.join(sorted(map(str, devices)))}; "
            "put the denoiser, the timestep and all other inputs on one CUDA device",
            stacklevel=2,
        )
    return None


def _places(state: Mapping[StateKey, Tensor]) -> dict[StateKey, int]:
    return {key: value.data_ptr() for key, value in state.items()}


def _place_like(value: Tensor) -> Tensor:
    """Memory for ``value``, in its layout; written to in inference mode and outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _once(value: Tensor) -> Tensor:
    """``value`` without repetitions: of an axis that stays in one place in memory the first element."""
    for axis, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
        if stride == 0 and size > 1:
            value = value.narrow(axis, 0, 1)
    return value
