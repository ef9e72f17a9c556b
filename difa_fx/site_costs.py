"""What each method costs at one site, in seconds and in error: the input of :mod:`difa_fx.budget`.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from difa_fx.errors import CalibrationError
from difa_fx.plan_io import seen
from difa_fx.plan_words import Method

__all__ = ["LARGEST", "Array", "SiteCosts", "as_amount", "wrong_costs"]

Array: TypeAlias = NDArray[np.float64]

#: Larger costs are refused, so that no sum or product of costs overflows.
LARGEST: Final = 1e100


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SiteCosts:
    """What each method costs at one site, in seconds and in error, over T steps.

    Entries that no plan can use are not looked at: errors of methods that ``seconds`` leaves out, those of step 0, and
    those on and above the diagonal.

    Attributes:
        seconds: of each method that is possible here; ``full`` always is.
        refresh_seconds: extra for a ``full`` step whose residual a window step reads.
        refresh_cfg_seconds: the same for a ``full+cfg`` step.
        cached: ``[t, s]``: error of reusing at step t the output of step s, as if that output were exact.
        window: ``[t, s]``: error of a window at step t with the residual of the full step s.
        cfg: ``[t]``: error of ``full+cfg`` at step t.
    """

    seconds: Mapping[Method, float]
    refresh_seconds: float
    refresh_cfg_seconds: float
    cached: Array
    window: Array
    cfg: Array

    def __post_init__(self) -> None:
        seconds = {method: as_amount(value, f"seconds[{method}]") for method, value in self.seconds.items()}
        if Method.FULL not in seconds or not set(seconds) <= set(Method):
            raise wrong_costs("seconds", list(seconds), "methods, full among them")
        object.__setattr__(self, "seconds", seconds)
        for name in ("refresh_seconds", "refresh_cfg_seconds"):
            object.__setattr__(self, name, as_amount(getattr(self, name), name))
        steps = np.shape(self.cached)[0] if np.ndim(self.cached) else 0
        earlier, later = np.tri(steps, k=-1, dtype=bool), np.arange(steps) > 0
        readable = {
            "cached": earlier & (Method.CACHED in seconds),
            "window": earlier & any(method.windowed for method in seconds),
            "cfg": later & any(method.shares_cfg for method in seconds),
        }
        for name, mask in readable.items():
            object.__setattr__(self, name, _errors(getattr(self, name), name, mask))

    @property
    def steps(self) -> int:
        """T."""
        return len(self.cfg)


def as_amount(value: object, where: str, *, least: float = 0.0) -> float:
    """A number of seconds.

    Raises:
        CalibrationError: it is none, NaN, infinite or below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= float(value) <= LARGEST:
        raise wrong_costs(where, seen(value), "a finite number, 0 or more")
    return float(value)


def wrong_costs(where: str, got: object, allowed: object) -> CalibrationError:
    """The error for costs that cannot be searched."""
    return CalibrationError(
        "the costs of the sites are not right",
        where=where,
        got=got,
        allowed=allowed,
        todo="measure the site again, or leave out the method that could not be measured",
    )


def _errors(value: object, where: str, readable: NDArray[np.bool_]) -> Array:
    """A copy of an array of errors that cannot be written to, with 0 where no plan can read it."""
    given = np.asarray(value)
    if given.shape != readable.shape or not given.size:
        raise wrong_costs(where, f"an array {list(given.shape)}", "one number a step, or one for each pair of steps")
    if given.dtype.kind not in "fiu":
        raise wrong_costs(where, f"an array of {given.dtype}", "real numbers")
    errors = np.where(readable, given, 0.0).astype(np.float64)
    if not ((errors >= 0) & (errors <= LARGEST)).all():
        place = np.argwhere(~((errors >= 0) & (errors <= LARGEST)))[0].tolist()
        raise wrong_costs(f"{where}{place}", f"{errors[tuple(place)]}", "finite numbers, 0 or more")
    errors.setflags(write=False)
    return errors
