"""The options of the backend, checked before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from difa_fx._torch import inductor_mode, inductor_option_names
from difa_fx.attention import WINDOW_KERNELS
from difa_fx.compile import COMPILERS
from difa_fx.errors import OptionError, nearest, shown
from difa_fx.plan import Plan, as_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What ``torch.compile(backend="difa", options=..., mode=...)`` was given.

    Attributes:
        plan: which method each site uses at each step; None compiles exactly as Inductor would.
        strict: whether what a plan cannot do is an error (True), or full attention with a warning.
        compiler: ``inductor``, or ``aot_eager`` or ``eager`` to debug.
        window_kernel: ``auto``, ``cpp``, ``triton``, ``flex``, ``flash``, ``flash_attn`` or ``sdpa``.
        inductor: Inductor's own settings, as ``torch.compile(options=...)`` takes them.
        mode: torch's own, for instance ``max-autotune``: ``torch.compile`` takes no ``mode=`` beside ``options=``.
    """

    plan: Plan | None = None
    strict: bool = True
    compiler: str = "inductor"
    window_kernel: str = "auto"
    inductor: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None


def parse_options(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """Checked options; ``mode`` is the one that ``torch.compile`` was given without any.

    Raises:
        OptionError: an unknown key, a value of the wrong kind, or an unknown mode.
        PlanError: the plan is malformed.
    """
    given: dict[Any, Any] = dict(options or {})
    known = [f.name for f in fields(Options)]
    for key in given:
        if not isinstance(key, str) or key not in known:
            close = nearest(key, known, 1) if isinstance(key, str) else []
            raise OptionError(
                f"unknown option {shown(key)}",
                where="torch.compile(options=...)",
                got=key,
                allowed=known,
                todo=f"did you mean {close[0]!r}?" if close else "remove it",
            )
    _check_kind(given, "strict", bool)
    _check_choice(given, "compiler", COMPILERS)
    _check_choice(given, "window_kernel", WINDOW_KERNELS)
    _check_kind(given, "inductor", Mapping)
    if given.get("plan") is not None:
        given["plan"] = as_plan(given["plan"])
    given.setdefault("mode", mode)
    given["inductor"] = {**_mode(given["mode"]), **_inductor(given.get("inductor") or {})}
    return Options(**given)


def _check_kind(given: Mapping[str, Any], key: str, kind: type) -> None:
    if key in given and not isinstance(given[key], kind):
        raise OptionError(
            f"option {key!r} has the wrong type",
            where="torch.compile(options=...)",
            got=f"{shown(given[key])} ({type(given[key]).__name__})",
            allowed=kind.__name__,
            todo="mend the value",
        )


def _check_choice(given: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> None:
    if key in given and not (isinstance(given[key], str) and given[key] in choices):
        raise OptionError(
            f"option {key!r} has an unknown value",
            where="torch.compile(options=...)",
            got=given[key],
            allowed=choices,
            todo="use one of the allowed values",
        )


def _mode(mode: object) -> dict[str, Any]:
    try:
        return inductor_mode(mode if mode is None or isinstance(mode, str) else shown(mode))
    except RuntimeError as error:
        raise OptionError("unknown mode", where="torch.compile(mode=...)", got=mode, todo=str(error)) from None


def _inductor(settings: Mapping[Any, Any]) -> dict[str, Any]:
    known = set(inductor_option_names())
    for key in settings:
        if not isinstance(key, str) or key.replace("-", "_") not in known:
            raise OptionError(
                "unknown Inductor option",
                where="options['inductor']",
                got=key,
                allowed=(nearest(key, known) if isinstance(key, str) else None) or "torch._inductor.list_options()",
                todo="mend the name",
            )
    return {key.replace("-", "_"): value for key, value in settings.items()}
