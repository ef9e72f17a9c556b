"""Single steps: each method at every site, against the uncompressed denoiser, in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from difa_fx.bench import attention_time
from difa_fx.bench.children import compiled_by
from difa_fx.bench.efficiency import efficiencies, savable
from difa_fx.bench.plans import REFRESH, REFRESH_CFG, MethodPlan
from difa_fx.bench.records import Race, Row
from difa_fx.bench.sampling import noise_of, relative_l1
from difa_fx.bench.settings import Settings
from difa_fx.bench.steps import MethodSteps
from difa_fx.bench.subject import Subject
from difa_fx.bench.timing import Contender, Seconds, Spread, interleaved, ratios
from difa_fx.cost import kept_per_step
from difa_fx.plan import Method

_FULL_OF = {REFRESH: Method.FULL.value, REFRESH_CFG: Method.FULL_CFG.value}
"""What a step that also writes the residual is compared with."""


def label_of(name: str, settings: Settings) -> str:
    """A contender that compresses nothing, for tables."""
    plain = "Inductor" if settings.compiler == "inductor" else settings.compiler
    usual = plain if settings.mode is None else f"{plain}, {settings.mode}"
    return {"eager": "eager", "inductor": usual, "max-autotune": f"{plain}, max-autotune"}[name]


def race_methods(subject: Subject, settings: Settings, methods: MethodPlan) -> Race:
    """Measure every step that ``methods`` names."""
    uncompressed = {
        name: compiled_by(name, subject, None, settings.compiler, settings.mode) for name in settings.baselines
    }
    planned = compiled_by("difa", subject, methods.plan, settings.compiler, settings.mode)
    steps = MethodSteps(subject, planned, methods, settings.settled_after(subject.size))
    yielded = steps.prime()
    groups = attention_time.groups_of(subject, steps.arguments(1, 0))
    one = [
        *(Contender(name, partial(_step, steps, call, 1)) for name, call in uncompressed.items()),
        *(Contender(f"difa {name}", partial(steps.run, name), partial(steps.restore, name)) for name in methods.steps),
        *attention_time.contenders(groups, settings, cuda=subject.size.cuda),
    ]
    seconds = interleaved(
        one,
        rounds=settings.rounds_on(subject.size),
        warmup=settings.warmup_on(subject.size),
        cuda=subject.size.cuda,
        title=f"{subject.size.shape}: methods",
        progress=settings.progress,
    )
    alone = attention_time.site_seconds(groups, seconds)
    rows = [
        _plain_row(name, steps, call, uncompressed["inductor"], seconds, settings)
        for name, call in uncompressed.items()
    ]
    rows += [_row(name, steps, yielded[name], uncompressed["inductor"], seconds, alone) for name in methods.steps]
    attention = [sum(found.values()) * subject.calls_per_step for found in alone]
    return Race(
        rounds=len(alone),
        steps=1,
        attention_seconds=Spread.of(attention),
        attention_share=Spread.of(ratios(attention, seconds["inductor"])),
        rows=tuple(rows),
    )


def _step(steps: MethodSteps, call: Callable[..., Any], step: int) -> Tensor:
    """All calls of a step, uncompressed; the noise of the last."""
    output = None
    for number in range(steps.subject.calls_per_step):
        output = call(**steps.arguments(step, number))
    return noise_of(steps.subject, output)


def _plain_row(
    name: str,
    steps: MethodSteps,
    call: Callable[..., Any],
    reference: Callable[..., Any],
    seconds: Seconds,
    settings: Settings,
) -> Row:
    return Row(
        name=name,
        label=label_of(name, settings),
        seconds=Spread.of(seconds[name]),
        speedup=Spread.of(ratios(seconds["inductor"], seconds[name])),
        kept=1.0,
        relative_l1=relative_l1(_step(steps, call, 1), _step(steps, reference, 1)),
    )


def _row(
    name: str,
    steps: MethodSteps,
    yielded: Tensor,
    reference: Callable[..., Any],
    seconds: Seconds,
    alone: Sequence[dict[str, float]],
) -> Row:
    plan, step, shapes = steps.methods.plan, steps.methods.steps[name], steps.runner.stats.shapes
    own, plain, full = seconds[f"difa {name}"], seconds["inductor"], seconds["difa full"]
    saved = [savable(plan, [step], shapes, found) for found in alone]
    ideal = [a - b for a, b in zip(plain, saved, strict=True)]
    efficiency, of_full = efficiencies(plain, own, saved), efficiencies(full, own, saved)
    twin = _FULL_OF.get(name)
    return Row(
        name=name,
        label=f"difa, {name}",
        seconds=Spread.of(own),
        speedup=Spread.of(ratios(plain, own)),
        efficiency=None if efficiency is None else Spread.of(efficiency),
        efficiency_of_full=None if of_full is None else Spread.of(of_full),
        to_full=Spread.of(ratios(own, seconds[f"difa {twin}"])) if twin and f"difa {twin}" in seconds else None,
        kept=kept_per_step(plan, shapes, projections=True)[step],
        ideal_seconds=Spread.of(ideal).median,
        state_bytes=steps.state_bytes(name),
        relative_l1=relative_l1(yielded, _step(steps, reference, step)),
    )
