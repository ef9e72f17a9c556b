"""Whole generations: a plan, the uncompressed denoiser, and whoever else saves, in turn."""

from __future__ import annotations

import copy
import functools
import itertools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from difa_fx.bench import attention_time
from difa_fx.bench.cache_peers import CACHE_PEERS, cached
from difa_fx.bench.children import compiled_by
from difa_fx.bench.dynamo import Heard, apart, listening
from difa_fx.bench.efficiency import efficiencies, savable
from difa_fx.bench.method_race import label_of
from difa_fx.bench.peers import hooked
from difa_fx.bench.records import Race, Row
from difa_fx.bench.sampling import Denoiser, generate, relative_l1
from difa_fx.bench.settings import Settings, without_graphs
from difa_fx.bench.steps import runner_of
from difa_fx.bench.subject import Subject, timesteps
from difa_fx.bench.timing import Contender, Seconds, Spread, interleaved, ratios
from difa_fx.cost import SiteShape
from difa_fx.cost import kept as kept_share
from difa_fx.plan import Plan
from difa_fx.runtime import Runner
from difa_fx.session import reset

_PLAN = "plan"


@dataclass(frozen=True, slots=True, eq=False)
class Entrant:
    """A contender of whole generations, once it has run one.

    Attributes:
        label: for tables.
        denoiser: how it denoises.
        latents: what its last generation before the rounds ended in.
        heard: what Dynamo did in its first one.
        state_bytes: the most that it kept, as far as it is known.
    """

    label: str
    denoiser: Denoiser
    latents: Tensor
    heard: Heard
    state_bytes: int | None


def race_plan(subject: Subject, settings: Settings, plan: Plan, limit: int) -> tuple[Race, dict[str, str]]:
    """Measure generations under ``plan``; also gives the peers that were left out, with the reason.

    Args:
        subject: the denoiser.
        settings: who takes part.
        plan: fitted to the subject.
        limit: how often Dynamo may compile a frame of a peer.
    """
    entrants: dict[str, Entrant] = {}
    for name in settings.baselines:
        call = compiled_by(name, subject, None, settings.compiler, settings.mode)
        entrants[name] = _first(subject, plan, label_of(name, settings), partial(Denoiser, call))
    first_call = subject.arguments(subject.noise, timesteps(plan.steps)[0])
    runners: list[Runner] = []

    def planned() -> Denoiser:
        call = compiled_by("difa", subject, plan, settings.compiler, settings.mode)
        runners.append(runner_of(subject, call, first_call))
        return Denoiser(call, partial(reset, subject.model), kept=lambda: runners[0].stats.state_bytes)

    entrants[_PLAN] = _first(subject, plan, "difa, the plan", planned, settings.settled_after(subject.size))
    left_out = _add_peers(entrants, subject, settings, plan, limit)
    groups = attention_time.groups_of(subject, first_call)
    seconds = interleaved(
        [
            *(Contender(name, partial(generate, subject, e.denoiser, plan.steps)) for name, e in entrants.items()),
            *attention_time.contenders(groups, settings, cuda=subject.size.cuda),
        ],
        rounds=settings.rounds_on(subject.size),
        warmup=settings.warmup,
        cuda=subject.size.cuda,
        title=f"{subject.size.shape}: generations",
        progress=settings.progress,
    )
    alone = attention_time.site_seconds(groups, seconds)
    attention = [sum(found.values()) * subject.calls_per_step for found in alone]
    shapes = runners[0].stats.shapes
    rows = [_row(name, entrants, seconds, plan, shapes, alone) for name in entrants]
    race = Race(
        rounds=len(alone),
        steps=plan.steps,
        attention_seconds=Spread.of(attention),
        attention_share=Spread.of(a * plan.steps / b for a, b in zip(attention, seconds["inductor"], strict=True)),
        rows=tuple(rows),
    )
    return race, left_out


def _add_peers(
    entrants: dict[str, Entrant], subject: Subject, settings: Settings, plan: Plan, limit: int
) -> dict[str, str]:
    """Add the peers that can run; the others, with the reason."""
    left_out: dict[str, str] = {}
    for name in settings.peers:
        kind, _, compiles = name.partition("+")
        label = _setting(kind, subject, settings)
        refusal = None if kind == "hooked" else CACHE_PEERS[kind].refusal(subject)
        if refusal is not None:
            left_out[name] = refusal
            continue
        label += f", under {label_of('inductor', _for_peers(settings))}" if compiles else ", eager"
        compiled = partial(_compile, settings=settings, limit=limit) if compiles else None
        entrants[name] = _first(subject, plan, label, partial(_peer, kind, subject, settings, plan, compiled))
    return left_out


def _setting(kind: str, subject: Subject, settings: Settings) -> str:
    if kind == "hooked":
        window = "compiled flex_attention" if subject.size.cuda else "banded SDPA"
        return f"DiTFastAttn by attention processors, the same plan, window by {window}"
    return CACHE_PEERS[kind].setting(settings.first_block_threshold)


def _peer(
    kind: str, subject: Subject, settings: Settings, plan: Plan, compiled: Callable[[nn.Module], Any] | None
) -> Denoiser:
    model = twin(subject.model)
    if kind == "hooked":
        return hooked(subject, model, plan, compiled)
    return cached(CACHE_PEERS[kind], subject, model, compiled, threshold=settings.first_block_threshold)


def _for_peers(settings: Settings) -> Settings:
    """What peers keep between calls would lie in memory that the next CUDA graph overwrites."""
    return replace(settings, mode=without_graphs(settings.mode))


def _compile(model: nn.Module, *, settings: Settings, limit: int) -> Any:
    mode = _for_peers(settings).mode
    return torch.compile(model, backend=settings.compiler, dynamic=False, mode=mode, **apart(limit))


def twin(model: nn.Module) -> nn.Module:
    """A copy of a denoiser that shares its weights: hooks, processors and the code of ``forward`` are its own.

    Dynamo keeps what it compiled, and whether it gave up, with the code.  Where torch does not keep contenders apart
    (:func:`difa_fx.bench.dynamo.apart`), a peer that it gave up on would take all others with it.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    copied: nn.Module = copy.deepcopy(model, shared)
    kind = type(model)
    copied.__class__ = type(kind.__name__, (kind,), {"forward": _own_code(kind.forward), "__module__": kind.__module__})
    return copied


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    assert isinstance(function, types.FunctionType)
    parts = (function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own = types.FunctionType(function.__code__.replace(), *parts)
    own.__kwdefaults__ = function.__kwdefaults__
    return functools.wraps(function)(own)


def _first(subject: Subject, plan: Plan, label: str, make: Callable[[], Denoiser], generations: int = 1) -> Entrant:
    """Make a contender and run its first generations; in the very first it compiles."""
    most = 0
    with listening() as heard:
        denoiser = make()
        kept = denoiser.kept

        def tell(step: int, call: int, timestep: int) -> None:
            nonlocal most
            # Before the first call there may be what an earlier generation left.
            most = max(most, kept() if kept is not None and step else 0)
            denoiser.tell(step, call, timestep)

        latents = generate(subject, Denoiser(denoiser.call, denoiser.begin, tell), plan.steps)
    for _ in range(generations - 1):
        latents = generate(subject, denoiser, plan.steps)
    return Entrant(label, denoiser, latents, heard, most if kept is not None else None)


def _row(
    name: str,
    entrants: dict[str, Entrant],
    seconds: Seconds,
    plan: Plan,
    shapes: Mapping[str, SiteShape],
    alone: Sequence[dict[str, float]],
) -> Row:
    entrant = entrants[name]
    own, plain = ([value / plan.steps for value in seconds[key]] for key in (name, "inductor"))
    follows = name == _PLAN or name.startswith("hooked")
    saved = [savable(plan, range(plan.steps), shapes, found) / plan.steps for found in alone] if follows else None
    efficiency = None if saved is None else efficiencies(plain, own, saved)
    share = kept_share(plan, shapes, projections=True) if follows else None
    uncompressed = name in ("eager", "inductor", "max-autotune")
    return Row(
        name=name,
        label=entrant.label,
        seconds=Spread.of(own),
        speedup=Spread.of(ratios(plain, own)),
        efficiency=None if efficiency is None else Spread.of(efficiency),
        kept=1.0 if uncompressed else share,
        ideal_seconds=None if saved is None else Spread.of(a - b for a, b in zip(plain, saved, strict=True)).median,
        state_bytes=entrant.state_bytes,
        relative_l1=relative_l1(entrant.latents, entrants["inductor"].latents),
        graphs=None if uncompressed else entrant.heard.graphs,
        graph_breaks=None if uncompressed else entrant.heard.graph_breaks,
        gave_up=None if uncompressed else entrant.heard.gave_up,
    )
