"""What makes a plan right: a check for each field, and for all together.

Every ``as_...`` takes any value and the place it stands at, and gives the value as a plan keeps it,
or raises a :class:`~difa_fx.errors.PlanError` with that place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, get_args

from difa_fx.errors import PlanError, nearest
from difa_fx.plan_io import FrozenDict, freeze, looks_like_xdit, seen
from difa_fx.plan_words import CFGOrder, GridWindow, Method, Window

FORMAT: Final = "difa.plan"
VERSION: Final = 1

_REQUIRED: Final = ("format", "version", "steps", "cfg", "window", "sites", "methods")
_OPTIONAL: Final = ("denoiser", "timesteps", "provenance")

LARGEST: Final = 1_000_000
"""No plan has more steps, sites, or tokens in a window: what is larger is a mistake, and would take hours to check."""

_METHODS: Final[Mapping[str, Method]] = {method.value: method for method in Method}


def fault(what: str, where: str, got: object, allowed: object, todo: str = "mend the plan") -> PlanError:
    """The PlanError for a value; text is shown as it is, other values with their kind."""
    shown = got if isinstance(got, str) else seen(got)
    return PlanError(what, where=where, got=shown, allowed=allowed, todo=todo)


def as_count(value: object, where: str, *, least: int = 1) -> int:
    """A whole number of at least ``least``; True is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
        raise fault(
            f"{where} is not a whole number of at least {least}",
            where,
            seen(value),
            f"{least}, {least + 1}, ... {LARGEST}",
        )
    return int(value)


def as_window(value: object, where: str = "window") -> Window:
    """A window: a whole number of tokens to either side of a query, 0 or more, or ``{"grid": ..., "size": ...}``."""
    if isinstance(value, GridWindow):
        value = {"grid": value.grid, "size": value.size}
    if not isinstance(value, Mapping):
        return as_count(value, where, least=0)
    if set(value) != {"grid", "size"}:
        raise fault(
            "a window over a grid has other fields",
            where,
            list(value),
            '{"grid": [rows, columns], "size": [rows, columns]}, or three numbers each for frames too',
        )
    grid, size = (
        tuple(as_count(item, f"{where}.{name}[{i}]", least=least) for i, item in enumerate(given))
        for name, least in (("grid", 1), ("size", 0))
        for given in (_items(value[name], f"{where}.{name}", "whole numbers"),)
    )
    if len(grid) != len(size) or len(grid) not in (2, 3):
        raise fault(
            "grid and size of a window do not fit each other",
            where,
            f"{len(grid)} and {len(size)} axes",
            "2 axes (rows, columns) or 3 (frames, rows, columns) in both",
        )
    return GridWindow(grid, size)


def as_cfg(value: object, where: str) -> CFGOrder | None:
    """The order of the two halves of guidance, or None where there is one half alone."""
    if isinstance(value, str) and value in get_args(CFGOrder):
        return value  # type: ignore[return-value]
    if value is not None:
        raise fault(
            "the order of the CFG halves is unknown",
            where,
            value,
            "cond_first, uncond_first, cond_call_first, uncond_call_first, or null without CFG",
        )
    return None


def as_name(value: object, where: str) -> str | None:
    """Text that is not empty, or None."""
    if value is not None and (not isinstance(value, str) or not value):
        raise fault(f"{where} is not a name", where, seen(value), "text, or null")
    return value


def as_method(value: object, where: str, names: Mapping[str, Method] = _METHODS) -> Method:
    """A method, by itself or by its name in ``names``."""
    if isinstance(value, Method):
        return value
    if not isinstance(value, str):
        raise fault("a method is not given by name", where, value, list(names))
    if value not in names:
        close = nearest(value, names)
        todo = f"did you mean {' or '.join(close)}?" if close else "use one of those names"
        raise fault("unknown method", where, value, list(names), todo)
    return names[value]


def as_sites(value: object, where: str) -> tuple[str, ...]:
    """The sites' names: at least one, none empty, none twice."""
    sites = tuple(_items(value, where, "module paths"))
    if not sites:
        raise fault("the plan names no site", where, seen(value), "at least one module path")
    first: dict[str, int] = {}
    for index, site in enumerate(sites):
        if not isinstance(site, str) or not site:
            raise fault(
                "a site is not a module path",
                f"{where}[{index}]",
                seen(site),
                "text that is not empty",
            )
        if first.setdefault(site, index) != index:
            raise fault(
                f"a site is named twice, first at {where}[{first[site]}]",
                f"{where}[{index}]",
                site,
                "each site once",
            )
    return sites


def as_methods(value: object, where: str) -> tuple[tuple[Method, ...], ...]:
    """The rows of methods, one per step."""
    return tuple(
        tuple(
            as_method(cell, f"{where}[{step}][{index}]")
            for index, cell in enumerate(_items(row, f"{where}[{step}]", "methods, one per site"))
        )
        for step, row in enumerate(_items(value, where, "rows, one per step"))
    )


def as_timesteps(value: object, where: str) -> tuple[float, ...] | None:
    """Finite numbers, or None."""
    if value is None:
        return None
    steps = tuple(_items(value, where, "numbers, one per step"))
    for index, step in enumerate(steps):
        # Compared and not converted, because float() of a huge whole number raises.
        number = isinstance(step, (int, float)) and not isinstance(step, bool)
        if not number or not abs(step) <= 1e300 or math.isnan(step):
            raise fault("a timestep is not a finite number", f"{where}[{index}]", seen(step), "a number")
    return tuple(float(step) for step in steps)


def as_provenance(value: object, where: str) -> FrozenDict:
    """An unchangeable copy of any JSON object; None gives an empty one."""
    if value is None:
        return FrozenDict({})
    if not isinstance(value, Mapping):
        raise fault("provenance is not an object", where, value, "any JSON object, or null")
    try:
        frozen = freeze(value, where)
    except RecursionError:
        raise fault("provenance is nested too deep", where, value, "a few levels") from None
    assert isinstance(frozen, FrozenDict)
    return frozen


def check_shape(
    steps: int,
    sites: Sequence[str],
    methods: Sequence[Sequence[Method]],
    timesteps: Sequence[float] | None,
) -> None:
    """Checks that there are as many rows, cells and timesteps as steps and sites ask for."""
    if len(methods) != steps:
        raise fault(
            "the plan has not one row of methods per step",
            "methods",
            f"{len(methods)} rows",
            f"{steps} rows, as steps says",
        )
    for step, row in enumerate(methods):
        if len(row) != len(sites):
            raise fault(
                "a row has not one method per site",
                f"methods[{step}]",
                f"{len(row)} methods",
                f"{len(sites)} methods, as many as sites",
            )
    if timesteps is not None and len(timesteps) != steps:
        raise fault(
            "the plan has not one timestep per step",
            "timesteps",
            f"{len(timesteps)} numbers",
            f"{steps} numbers, as steps says, or null",
        )


def check_cfg(cfg: CFGOrder | None, methods: Sequence[Sequence[Method]]) -> None:
    """Checks that the order of the halves is known wherever a method shares them, and that it lets them be shared."""
    for step, row in enumerate(methods):
        for index, method in enumerate(row):
            if method.shares_cfg and cfg is None:
                raise fault(
                    "the plan shares CFG halves and does not say which half is the conditional one",
                    f"methods[{step}][{index}]",
                    str(method),
                    "full, window or cached while cfg is null",
                    'set cfg to "cond_first" (diffusers\' DiT) or "uncond_first" (PixArt)',
                )
            if method.shares_cfg and cfg == "uncond_call_first":
                raise fault(
                    "the unconditional call comes first and cannot use what the conditional call will compute",
                    f"methods[{step}][{index}]",
                    str(method),
                    "full, window or cached while cfg is uncond_call_first",
                    "let the sampler make the conditional call first (cond_call_first), or batch the two",
                )


def check_reads(methods: Sequence[Sequence[Method]], sites: Sequence[str]) -> None:
    """Checks that what a step reads was written at an earlier one.

    ``cached`` reads the output of any step that computed one; a window reads the residual of a
    ``full`` or ``full+cfg`` step.

    Raises:
        PlanError: naming the first step and site that read too early.
    """
    has_output, has_residual = [False] * len(sites), [False] * len(sites)
    for step, row in enumerate(methods):
        for index, method in enumerate(row):
            if not method.computes and not has_output[index]:
                raise _read_early(step, index, sites[index], method, "an output")
            if method.windowed and not has_residual[index]:
                raise _read_early(step, index, sites[index], method, "a residual")
            has_output[index] |= method.computes
            has_residual[index] |= method.refreshes


def check_first_step(methods: Sequence[Sequence[Method]]) -> None:
    """Checks that the first step is ``full`` everywhere: later steps are measured against it."""
    for index, method in enumerate(methods[0]):
        if method is not Method.FULL:
            raise fault(
                "the first step is not full at every site",
                f"methods[0][{index}]",
                str(method),
                "full",
                "make the first row full",
            )


def check_fields(value: object, where: str) -> None:
    """Checks the outer form of a plan's JSON: its format, its version, the names of its fields."""
    if not isinstance(value, Mapping):
        raise fault("a plan is not a JSON object", where, value, "an object with the fields of a plan")
    if looks_like_xdit(value):
        raise fault(
            "this is a plan of xDiT",
            where,
            list(value),
            f'an object with "format": "{FORMAT}"',
            "read it with Plan.from_xdit(path, window=...) and save that",
        )
    named = value.get("format")
    if not isinstance(named, str) or named != FORMAT:
        raise fault(
            "this is not a plan of difa_fx",
            f"{where}: format",
            named,
            FORMAT,
            "save a plan with Plan.save(path)",
        )
    version = value.get("version")
    if isinstance(version, bool) or not isinstance(version, (int, float)) or version != VERSION:
        raise fault(
            "the version of the plan format is not supported",
            f"{where}: version",
            seen(version),
            f"{VERSION}",
            "update difa_fx, or save the plan again with this one",
        )
    known = _REQUIRED + _OPTIONAL
    for name in value:
        if name not in known:
            close = nearest(name if isinstance(name, str) else seen(name), known) or ["put it into provenance"]
            raise fault("a plan has no such field", where, name, known, f"nearest: {', '.join(close)}")
    if missing := [name for name in _REQUIRED if name not in value]:
        raise fault(
            "a field is missing",
            where,
            f"none of: {', '.join(missing)}",
            list(_REQUIRED),
            f"add {', '.join(missing)} (cfg may be null)",
        )


def _read_early(step: int, index: int, site: str, method: Method, what: str) -> PlanError:
    return fault(
        f"step {step} of {site} reads {what} that was never written",
        f"methods[{step}][{index}]",
        str(method),
        "full or full+cfg at an earlier step of the site",
        "make the first step full at every site",
    )


def _items(value: object, where: str, of: str) -> Iterable[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise fault(f"{where} is not a list", where, seen(value), f"a list of {of}")
    if len(value) > LARGEST:
        raise fault(f"{where} is too long", where, f"{len(value)} items", f"at most {LARGEST}")
    return value
