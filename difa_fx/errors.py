"""Every error difa_fx raises on purpose.

Each says what is wrong, where, what was got, what is allowed and what to do, in that order, so that a
user can act on the message without reading this package.  All derive from :class:`DifaError`.
"""

from __future__ import annotations

import difflib
import itertools
import reprlib
from collections.abc import Iterable
from enum import Enum
from typing import Final

_MOST_NAMES: Final = 1000
_LONGEST_NAME: Final = 200

_REPR = reprlib.Repr()  # of lists within lists it shows a few
_REPR.maxlevel = 4
_REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxdict = 20
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 400


class DifaError(Exception):
    """Base of all errors of difa_fx.

    Args:
        what: one sentence, the fault itself.
        where: the file, field, site or node it was found at.
        got: the offending value; shortened when it is long.
        allowed: the values or the form that would be right.
        todo: what the user can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        allowed: object = None,
        todo: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.allowed, self.todo = what, where, got, allowed, todo
        parts = [what]
        if where is not None:
            parts.append(f"where: {where}")
        if got is not None:
            parts.append(f"got: {short(got)}")
        if allowed is not None:
            parts.append(f"allowed: {short(allowed, 400)}")
        if todo is not None:
            parts.append(f"to do: {todo}")
        super().__init__(printable("\n  ".join(parts)))


class PlanError(DifaError, ValueError):
    """A plan is malformed, or does not fit the denoiser it is used on."""


class PlanFileError(PlanError):
    """A plan file cannot be read or written."""


class OptionError(DifaError, ValueError):
    """An option of the backend is unknown or has a wrong value."""


class SiteError(DifaError):
    """A site cannot do what the plan asks of it."""


class CFGError(DifaError):
    """The batch is not the pair of halves that a ``+cfg`` method needs."""


class ClockError(DifaError):
    """The denoiser was called at a step that the plan does not expect."""


class GradError(DifaError):
    """Gradients are on; a plan is for inference alone."""


class GraphError(DifaError):
    """A traced graph holds something that difa_fx cannot keep exact."""


class AttachError(DifaError):
    """A pipeline cannot be attached to, or is not attached."""


class CalibrationError(DifaError):
    """A calibration cannot start, go on or reach its target."""


class EvaluationError(DifaError):
    """Images cannot be made, prepared or judged: an input is missing, or does not fit."""


class MetricUnavailableError(EvaluationError):
    """A metric needs a package, weights or larger images than there are."""


class BenchmarkError(DifaError):
    """A measurement cannot be made."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The ``count`` names of ``known`` that look most like ``name``, best first; not all of very many are looked at."""
    names = list(itertools.islice(known, _MOST_NAMES))
    return difflib.get_close_matches(name[:_LONGEST_NAME], names, n=count, cutoff=0.4)


def printable(text: str) -> str:
    """``text`` for a terminal: what would move its cursor, colour it or is no text at all is spelled out."""
    return "".join(c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in text)


def short(value: object, limit: int = 200) -> str:
    """``value`` in a line of an error; never an exception, whatever it is."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, (list, tuple, set, frozenset)):
        first = list(itertools.islice(value, _MOST_NAMES))
        text = ", ".join(item if isinstance(item, str) else shown(item) for item in first)
        text += ", ..." if len(value) > len(first) else ""
    else:
        text = shown(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def shown(value: object) -> str:
    """``repr``, but short, and never an exception: it raises for numbers of thousands of digits."""
    try:
        return str(value) if isinstance(value, Enum) else _REPR.repr(value)
    except Exception:  # noqa: BLE001  an error's text must not be another error
        digits = f" of {value.bit_length()} bits" if isinstance(value, int) else ""
        return f"<{type(value).__name__}{digits}>"
