"""One run: every size and window one after the other, and in each all contenders in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from difa_fx.bench.children import compare
from difa_fx.bench.dynamo import room
from difa_fx.bench.method_race import race_methods
from difa_fx.bench.plan_race import race_plan
from difa_fx.bench.plans import fitted_plan, method_plan, methods_of, window_of
from difa_fx.bench.records import Bench, Case
from difa_fx.bench.settings import Settings, Size, size_json
from difa_fx.bench.shapes import make_subject
from difa_fx.hardware import hardware, versions
from difa_fx.plan import Plan

Window = str | int | None

_MANY = 64
"""Compilations of one denoiser's code that a case may need, all contenders together."""


def run(
    sizes: Sequence[Size],
    settings: Settings,
    *,
    windows: Sequence[Window] = (None,),
    finished: Callable[[Bench], object] | None = None,
) -> Bench:
    """Measure every size at every window.

    Dynamo's caches are cleared before and after each case, so other compiled code compiles again at its next call.

    Args:
        sizes: denoisers and their sizes.
        settings: what is measured.
        windows: tokens to either side; None or ``n/8`` is an eighth of the image's tokens, and None leaves a plan
            its own window.
        finished: called with the record so far after each case.

    Raises:
        OptionError: a denoiser cannot have that size, or the plan does not fit it.
        BenchmarkError: a measurement failed.
    """
    bench = Bench(hardware=hardware(), versions=versions(), settings=settings.as_json(), cases=())
    for size in sizes:
        for window in windows:
            bench = replace(bench, cases=(*bench.cases, measure(size, settings, window)))
            if finished is not None:
                finished(bench)
    return bench


def measure(size: Size, settings: Settings, window: Window = None) -> Case:
    """One denoiser at one size and window."""
    torch.compiler.reset()
    try:
        case, filled, plan = _in_turn(size, settings, window)
    finally:
        torch.compiler.reset()
        gc.collect()
        if size.cuda:
            torch.cuda.empty_cache()
    return replace(case, compiled=compare(filled, settings, plan)) if settings.processes else case


def _in_turn(size: Size, settings: Settings, window: Window) -> tuple[Case, Size, Plan]:
    """What is measured in this process; the size with nothing left open, and the plan for other processes."""
    with torch.no_grad(), room(_MANY) as limit:
        subject = make_subject(size)
        reach = window_of(window, subject)
        possible = methods_of(subject, settings.methods)
        left_out = {name: "there is no guidance" for name in settings.methods if name not in possible}
        single = method_plan(subject, possible, reach)
        plan = generation = None
        if settings.plan is not None:
            own = None if window is None else reach
            plan = fitted_plan(settings.plan, subject, columns=settings.columns, steps=settings.steps, window=own)
        methods = race_methods(subject, settings, single) if settings.methods else None
        if plan is not None:
            generation, refused = race_plan(subject, settings, plan, limit)
            left_out |= refused
    case = Case(
        size=size_json(subject.size),
        sites=len(subject.sites),
        text_tokens=sum(subject.text),
        window=reach,
        plan=None if plan is None else str(plan),
        methods=methods,
        generation=generation,
        compiled=(),
        left_out=left_out,
    )
    return case, subject.size, plan or single.plan
