"""What was measured, as frozen records, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from difa_fx.bench.timing import Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender in one kind of rounds.

    Attributes:
        name: ``eager``, ``inductor``, a method, ``refresh``, ``plan``, or a peer.
        label: for tables, with its setting.
        seconds: of a step: all calls of the denoiser in it.
        speedup: the uncompressed compiled denoiser's seconds over its own, in each round.
        efficiency: saving efficiency, from the uncompressed compiled denoiser (:mod:`difa_fx.bench.efficiency`).
        efficiency_of_full: the same from difa_fx's own full step.
        to_full: its seconds over those of the same step without the residual; of ``refresh`` and ``refresh+cfg``.
        kept: share of the attention's operations that is kept, projections counted.
        ideal_seconds: what a step would take if time went with operations.
        state_bytes: the most that is kept between calls; of a single step what is kept before it.
        relative_l1: of its last output to that of the uncompressed, compiled denoiser.
        graphs: graphs that Dynamo compiled for it while it warmed up.
        graph_breaks: how often Dynamo broke a graph for it.
        gave_up: how often Dynamo stopped compiling because a frame had been compiled too often.
    """

    name: str
    label: str
    seconds: Spread
    speedup: Spread
    efficiency: Spread | None = None
    efficiency_of_full: Spread | None = None
    to_full: Spread | None = None
    kept: float | None = None
    ideal_seconds: float | None = None
    state_bytes: int | None = None
    relative_l1: float | None = None
    graphs: int | None = None
    graph_breaks: int | None = None
    gave_up: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """Contenders that took turns.

    Attributes:
        rounds: turns of each.
        steps: steps of a generation; 1 where single steps were measured.
        attention_seconds: the attention of all sites in one step, measured by itself.
        attention_share: of the uncompressed compiled step's seconds.
        rows: the contenders.
    """

    rounds: int
    steps: int
    attention_seconds: Spread
    attention_share: Spread
    rows: tuple[Row, ...]

    def row(self, name: str) -> Row:
        """The row of that name.  Raises KeyError where there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)


ALLOCATED: Final = "allocated on the device, of a generation after the first calls"
"""On CUDA: ``torch.cuda.max_memory_allocated``, weights included."""

RESERVED: Final = "reserved on the device, of a generation after the first calls"
"""With CUDA graphs: ``torch.cuda.max_memory_reserved``, for what their pools hold is not counted as allocated."""

RESIDENT_AFTER: Final = "resident, of a generation after the first calls"
"""On Linux: the largest resident set from then on, which holds Python, torch, weights and what compilation left."""

RESIDENT: Final = "resident, of the whole process"
"""Elsewhere: the largest resident set of all, compilation included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """Compilation and memory of one contender, each measured in a process of its own.

    Attributes:
        name: the contender.
        cold_seconds: the first call, with empty caches on disk, less a later one; None for eager.
        warm_seconds: the same in a second process with those caches.
        cold_to_inductor: ratio of each pair of processes to Inductor's.
        warm_to_inductor: likewise.
        peak_bytes: the warm process's.
        peak_of: what that is: :data:`ALLOCATED`, :data:`RESERVED`, :data:`RESIDENT_AFTER` or :data:`RESIDENT`.
    """

    name: str
    cold_seconds: Spread | None
    warm_seconds: Spread | None
    cold_to_inductor: Spread | None
    warm_to_inductor: Spread | None
    peak_bytes: int
    peak_of: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One denoiser at one size and window.

    Attributes:
        size: see :class:`difa_fx.bench.settings.Size`.
        sites: self-attentions that a plan may change.
        text_tokens: in the same sequence as the image's.
        window: of the methods, tokens to either side.
        plan: the plan, for people.
        methods: single steps, each method at every site.
        generation: whole generations under the plan and by its peers.
        compiled: compilation and memory.
        left_out: what did not run, and why.
    """

    size: Mapping[str, Any]
    sites: int
    text_tokens: int
    window: int
    plan: str | None
    methods: Race | None
    generation: Race | None
    compiled: tuple[Compiled, ...]
    left_out: Mapping[str, str]

    @property
    def title(self) -> str:
        """What it is, in a line."""
        size = self.size
        tokens = f"{size['tokens']} tokens" + (f" + {self.text_tokens} of text" if self.text_tokens else "")
        tiny = ", tiny" if size["tiny"] else ""
        return f"{size['shape']}{tiny}: {size['layers']} layers, batch {size['batch']}, {tokens}, {size['dtype']}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A whole run.

    Attributes:
        hardware: what it ran on.
        versions: of the packages.
        settings: what was measured.
        cases: in the order in which they ran.
    """

    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    cases: tuple[Case, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"format": "difa.bench", "version": 1, **asdict(self)}


def bench_from_dict(value: Mapping[str, Any]) -> Bench:
    """What :meth:`Bench.to_dict` gave."""
    return Bench(
        hardware=value["hardware"],
        versions=value["versions"],
        settings=value["settings"],
        cases=tuple(_case(case) for case in value["cases"]),
    )


def _case(value: Mapping[str, Any]) -> Case:
    made = {
        "methods": _race(value["methods"]),
        "generation": _race(value["generation"]),
        "compiled": tuple(Compiled(**_spreads(row)) for row in value["compiled"]),
    }
    return Case(**{**value, **made})


def _race(value: Mapping[str, Any] | None) -> Race | None:
    if value is None:
        return None
    return Race(**{**_spreads(value), "rows": tuple(Row(**_spreads(row)) for row in value["rows"])})


def _spreads(value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` with every spread as a record again."""
    names = {"median", "least", "largest"}
    return {k: Spread(**v) if isinstance(v, Mapping) and set(v) == names else v for k, v in value.items()}
