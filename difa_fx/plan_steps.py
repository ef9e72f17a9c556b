"""A plan's methods for another number of steps.

A new step takes, site by site, the method of the old step at the same relative position: the first the first one's, the
last the last one's.  With more steps every old step is repeated, the full ones too, so that nothing is read that is
older, in relative time, than in the old plan by a new step or more.  Shares of methods are kept as far as rounding lets
them: exactly for twice the steps, less so for half as many again, where every second step comes twice.

With fewer steps, old steps are left out, and with them what later ones read.  A step that would read something older
than what it read in the old plan, by more than one new step, takes the method of the old plan's source instead: it
computes anew what a left out step would have computed.  So fewer steps can mean a larger share of full ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Final

from difa_fx.plan_words import Method

_CALIBRATION: Final = "calibration"
_DERIVED: Final = "derived"
_ORIGINAL: Final = "calibration of the original"


def resampled(column: Sequence[Method], steps: int) -> tuple[Method, ...]:
    """One site's methods for ``steps`` steps, from those that it has; right if those are."""
    last, between = len(column) - 1, max(steps - 1, 1)
    outputs = _latest([method.computes for method in column])
    residuals = _latest([method.refreshes for method in column])
    methods: list[Method] = []
    output = residual = 0  # the old steps that the current ones stand for
    for step in range(steps):
        old = (2 * step * last + between) // (2 * between)
        method = column[old]
        if not method.computes and (outputs[old] - output) * between > last:
            method = column[outputs[old]]
        if method.windowed and (residuals[old] - residual) * between > last:
            method = column[residuals[old]]
        output = old if method.computes else output
        residual = old if method.refreshes else residual
        methods.append(method)
    return tuple(methods)


def derived(provenance: Mapping[str, Any], from_steps: int, to_steps: int) -> dict[str, Any]:
    """The provenance of a plan for another number of steps: the figures of a calibration are the original's alone."""
    kept = {name: value for name, value in provenance.items() if name not in (_CALIBRATION, _DERIVED)}
    before = provenance.get(_DERIVED)
    changed: dict[str, Any] = {"from_steps": from_steps, "to_steps": to_steps}
    if before is not None:
        changed["before"] = before
    if _CALIBRATION in provenance:
        changed[_ORIGINAL] = provenance[_CALIBRATION]
    return {**kept, _DERIVED: changed}


def _latest(marks: Sequence[bool]) -> list[int]:
    """For each step, the last marked one up to it; the first always counts as marked."""
    return list(accumulate((step if mark else 0 for step, mark in enumerate(marks)), max))
