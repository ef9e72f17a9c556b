"""What a plan's provenance says about its calibration, and the same in a few lines of text.

Provenance is free-form JSON, so :func:`calibration_of` believes nothing: a part that is missing or of another form is
None.  This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from difa_fx.plan import Method, Plan

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a plan's provenance says about its search; a part that is not there is None.

    Attributes:
        search: ``greedy`` or ``budget``.
        threshold: the greedy search's; site number i of M was held to i/M of it.
        loss: name of the loss.
        candidates: names of the methods in the order they were tried.
        samples: generations that losses are means of.
        seed: of the samples' noise.
        losses: for each step and site, the loss of each candidate that was tried.
        limits: what the losses of each site were held to.
        full_seconds: time of each step of the uncompressed run.
        plan_seconds: time of each step under the plan.
        drift: relative L2 distance of the latents from the uncompressed run's, after each step.
        predicted: ``speed_up``, ``flops_kept`` and so on, as the search expected.
        measured: ``speed_up``, ``drift`` and so on, as they were.
    """

    search: str | None = None
    threshold: float | None = None
    loss: str | None = None
    candidates: tuple[str, ...] | None = None
    samples: int | None = None
    seed: int | None = None
    losses: tuple[tuple[Mapping[str, float], ...], ...] | None = None
    limits: tuple[float, ...] | None = None
    full_seconds: tuple[float, ...] | None = None
    plan_seconds: tuple[float, ...] | None = None
    drift: tuple[float, ...] | None = None
    predicted: Mapping[str, float] | None = None
    measured: Mapping[str, float] | None = None


def calibration_of(plan: Plan) -> Calibration | None:
    """What the plan says about its search, or None where it says nothing; never an exception."""
    data = plan.provenance.get("calibration")
    if not isinstance(data, Mapping):
        return None
    get, steps, sites = data.get, plan.steps, len(plan.sites)
    seconds = get("step_seconds", {})
    seconds = seconds if isinstance(seconds, Mapping) else {}
    return Calibration(
        search=_text(get("search")),
        threshold=_number(get("threshold")),
        loss=_text(get("loss")),
        candidates=_list(get("candidates"), _text),
        samples=_whole(get("samples")),
        seed=_whole(get("seed")),
        losses=_list(get("losses"), lambda row: _list(row, _numbers, sites), steps),
        limits=_list(get("limits"), _number, sites),
        full_seconds=_list(seconds.get("full"), _number, steps),
        plan_seconds=_list(seconds.get("plan"), _number, steps),
        drift=_list(get("drift"), _number, steps),
        predicted=_numbers(get("predicted")),
        measured=_numbers(get("measured")),
    )


def first_admitting_threshold(plan: Plan) -> tuple[float, int, str, str] | None:
    """What an all-``full`` plan of the greedy search would have needed: (threshold, step, site, method).

    Site number i of M (from 1) takes a candidate of loss L where L < i/M * threshold, so any
    threshold *above* the least L * M/i admits one.

    Returns:
        None where the plan is of another kind, or holds no losses.
    """
    calibration = calibration_of(plan)
    if calibration is None or not _is_stuck(plan, calibration):
        return None
    first = min(_trials(calibration), default=None, key=lambda trial: trial.threshold)
    return first and (first.threshold, first.step, plan.sites[first.site], first.method)


def summary(plan: Plan) -> str:
    """The plan in a few lines: its methods, its search, what that promised and what came of it.

    Where a greedy search left every cell ``full``, it says what stood in the way.
    """
    cells = plan.steps * len(plan.sites)
    used = [f"{method} {count} ({_percent(count, cells)})" for method, count in plan.counts().items() if count]
    lines = [f"{cells} cells: {', '.join(used)}"]
    if calibration := calibration_of(plan):
        lines += [*_about_search(calibration), *_about_gain(calibration)]
        if _is_stuck(plan, calibration):
            lines += _about_stuck(plan, calibration)
    return "\n".join(lines)


class _Trial(NamedTuple):
    """A candidate that was refused, and the threshold above which it would have been taken."""

    threshold: float
    step: int
    site: int
    method: str
    loss: float


def _is_stuck(plan: Plan, calibration: Calibration) -> bool:
    all_full = all(method is Method.FULL for row in plan.methods for method in row)
    return all_full and calibration.search == "greedy"


def _trials(calibration: Calibration) -> Iterator[_Trial]:
    for step, row in enumerate(calibration.losses or ()):
        for site, tried in enumerate(row):
            for method, loss in tried.items():
                yield _Trial(loss * len(row) / (site + 1), step, site, method, loss)


def _about_search(calibration: Calibration) -> list[str]:
    words = [f"{calibration.search or 'unknown'} search"]
    if calibration.threshold is not None:
        words.append(f"threshold {calibration.threshold:g}")
    if calibration.loss is not None:
        words.append(f"{calibration.loss} loss")
    if calibration.samples is not None:
        words.append(f"{calibration.samples} samples")
    return [", ".join(words)]


def _about_gain(calibration: Calibration) -> list[str]:
    lines = []
    for name, found in (("predicted", calibration.predicted), ("measured", calibration.measured)):
        words = []
        if found and "speed_up" in found:
            slower = ": it is slower" if found["speed_up"] < 1 else ""
            words.append(f"{found['speed_up']:.2f}x the speed of full attention{slower}")
        if found and "flops_kept" in found:
            words.append(f"{found['flops_kept']:.0%} of the attention's operations")
        if found and "drift" in found:
            words.append(f"final sample {found['drift']:.1%} away from the uncompressed one (relative L2)")
        if words:
            lines.append(f"{name}: {', '.join(words)}")
    return lines


def _about_stuck(plan: Plan, calibration: Calibration) -> list[str]:
    lines = ["every cell is full: no candidate's loss was below its layer's limit"]
    trials = sorted(_trials(calibration), key=lambda trial: trial.threshold)
    for trial in trials[:3]:
        limit = calibration.limits[trial.site] if calibration.limits else None
        against = "" if limit is None else f", limit {limit:.4g}"
        lines.append(f"  {trial.method} at step {trial.step}, {plan.sites[trial.site]}: loss {trial.loss:.4g}{against}")
    if trials:
        lines.append(f"a threshold above {trials[0].threshold:.4g} would have admitted the first of these")
    return lines


def _number(value: object) -> float | None:
    # Compared and not asked for, because float() of a huge whole number raises, and so does isfinite().
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300
    return float(value) if good else None  # type: ignore[arg-type]


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _numbers(value: object) -> Mapping[str, float] | None:
    """The numbers in a mapping; what else stands in it is left out."""
    if not isinstance(value, Mapping):
        return None
    found = {str(key): _number(item) for key, item in value.items()}
    return {key: item for key, item in found.items() if item is not None}


def _list(value: object, read: Callable[[Any], T | None], length: int | None = None) -> tuple[T, ...] | None:
    """All items read, or None when one cannot be, or when there are not ``length`` of them."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return None
    found = [read(item) for item in value]
    if length is not None and len(found) != length:
        return None
    kept = tuple(item for item in found if item is not None)
    return kept if len(kept) == len(found) else None


def _percent(count: int, of: int) -> str:
    return f"{count / of:.0%}"
