"""The plan: which method each site uses at each step.

A plan is steps x sites -> :class:`Method`, with the window and the order of the CFG halves.  It is
checked when it is made and never changes after that, so whoever holds one can rely on it.  It knows
nothing about a model: :meth:`Plan.check_sites` compares it with the sites that a graph really has.

This module imports no torch, so that tools can read plans without it.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Final

from difa_fx import plan_rules as rules
from difa_fx.errors import PlanError, nearest
from difa_fx.plan_io import FrozenDict, plan_text, read_json, thaw, write_text
from difa_fx.plan_rules import FORMAT, VERSION, as_window, check_reads, fault
from difa_fx.plan_steps import derived, resampled
from difa_fx.plan_words import CFGOrder, GridWindow, Method, Window, calls_per_step, window_json
from difa_fx.plan_xdit import read_xdit

__all__ = [
    "DEFAULT_WINDOW",
    "CFGOrder",
    "GridWindow",
    "Method",
    "Plan",
    "Window",
    "as_plan",
    "as_window",
    "check_reads",
]

#: Tokens to either side, where nothing else is said: the authors' own for 1 024 tokens.
DEFAULT_WINDOW: Final = 128

#: Each field's own check, run whenever a plan is made.
_CHECKS: Final[Mapping[str, Callable[[object, str], object]]] = {
    "steps": rules.as_count,
    "sites": rules.as_sites,
    "methods": rules.as_methods,
    "window": as_window,
    "cfg": rules.as_cfg,
    "denoiser": rules.as_name,
    "timesteps": rules.as_timesteps,
    "provenance": rules.as_provenance,
}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Plan:
    """A method for every step and site.

    Methods may be given by name and sequences as lists; what is kept is immutable.  Sites that a
    denoiser has and a plan does not mention run ``full``.

    Attributes:
        steps: calls of the denoiser in one generation.
        sites: module paths of the self-attentions, in the order of the columns of ``methods``.
        methods: one row per step, one method per site in it.
        window: tokens to either side of a query that ``window`` attends to, or a :class:`GridWindow`.
        cfg: which half of the batch, or which of two calls a step, is the conditional one; None without guidance.
        denoiser: class name of the module the plan was made for, for people to read.
        timesteps: the sampler's timestep at each step, or None.
        provenance: where the plan comes from; any JSON object.
    """

    steps: int
    sites: tuple[str, ...]
    methods: tuple[tuple[Method, ...], ...]
    window: Window
    cfg: CFGOrder | None
    denoiser: str | None = None
    timesteps: tuple[float, ...] | None = None
    provenance: Mapping[str, Any] = field(default_factory=lambda: FrozenDict({}))

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(getattr(self, name), name))
        rules.check_shape(self.steps, self.sites, self.methods, self.timesteps)
        rules.check_cfg(self.cfg, self.methods)
        check_reads(self.methods, self.sites)
        rules.check_first_step(self.methods)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """The plan in a JSON file.

        Raises:
            PlanFileError: the file cannot be read, or is not JSON.
            PlanError: the JSON is not a valid plan; the message gives the field's path.
        """
        return cls.from_dict(read_json(path), where=os.fspath(path))

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], where: str = "plan") -> Plan:
        """The plan that :meth:`to_dict` gave; ``where`` names its source in errors.

        Raises:
            PlanError: a field is missing, unknown or wrong; the message gives its path.
        """
        rules.check_fields(value, where)
        settings = {name: item for name, item in value.items() if name in _CHECKS}
        try:
            return cls(**settings)
        except PlanError as error:
            raise _moved(error, where) from None

    @classmethod
    def full(cls, sites: Sequence[str], *, steps: int, **settings: Any) -> Plan:
        """A plan of ``full`` alone: the reference that others are compared with."""
        return cls.uniform(sites, steps=steps, every=1, **settings)

    @classmethod
    def uniform(
        cls,
        sites: Sequence[str],
        *,
        steps: int,
        every: int,
        method: Method | str = Method.CACHED,
        window: Window = DEFAULT_WINDOW,
        cfg: CFGOrder | None = None,
        warmup: int = 1,
        **settings: Any,
    ) -> Plan:
        """``full`` in the first ``warmup`` steps and at every ``every``-th step from there.

        Args:
            sites: module paths of the self-attentions.
            steps: calls of the denoiser in one generation.
            every: distance from one ``full`` step to the next; 1 makes all steps ``full``.
            method: what the sites do at the steps between.
            window: tokens to either side of a query.
            cfg: which half of the batch is the conditional one.
            warmup: ``full`` steps at the start, at least 1.
            **settings: other fields of :class:`Plan`.
        """
        steps, every = rules.as_count(steps, "steps"), rules.as_count(every, "every")
        last_warm = rules.as_count(warmup, "warmup") - 1
        names, between = rules.as_sites(sites, "sites"), rules.as_method(method, "method")
        rows = tuple(
            (Method.FULL if i < last_warm or (i - last_warm) % every == 0 else between,) * len(names)
            for i in range(steps)
        )
        return cls(steps=steps, sites=names, methods=rows, window=window, cfg=cfg, **settings)

    @classmethod
    def from_xdit(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any],
        *,
        window: Window,
        site: str = "transformer_blocks.{block}.attn1",
        cfg: CFGOrder | None = None,
        **settings: Any,
    ) -> Plan:
        """The plan in xDiT's JSON, ``{"block0": {"step0": "FULL_ATTN", ...}, ...}``.

        Args:
            source: the file, or what is in it.
            window: xDiT keeps it in the file's name alone: the last number of
                ``<model>_<steps>_<samples>_<threshold>_<window>.json``.
            site: module path of a block's self-attention, ``{block}`` standing for its number.
            cfg: which half of the batch is the conditional one; xDiT's file does not say.
            **settings: other fields of :class:`Plan`.
        """
        methods, sites = read_xdit(source, site)
        return cls(steps=len(methods), sites=sites, methods=methods, window=window, cfg=cfg, **settings)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values, in the order of the file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "denoiser": self.denoiser,
            "steps": self.steps,
            "cfg": self.cfg,
            "window": window_json(self.window),
            "sites": list(self.sites),
            "methods": [[method.value for method in row] for row in self.methods],
            "timesteps": thaw(self.timesteps),
            "provenance": thaw(self.provenance),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON; the file is replaced in one move, or left as it was.

        Raises:
            PlanFileError: the file cannot be written.
        """
        write_text(path, plan_text(self.to_dict()))

    def replace(self, **changes: Any) -> Plan:
        """The plan with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def without_cfg(self) -> Plan:
        """The plan for the conditional half alone: ``+cfg`` methods without it."""
        return self.replace(methods=[[method.alone for method in row] for row in self.methods])

    def for_steps(self, n: int, *, timesteps: Sequence[float] | None = None) -> Plan:
        """A plan for ``n`` steps, each with the methods of the step at the same relative position.

        Its own ``timesteps`` are kept if ``n`` is ``steps``.  See :mod:`difa_fx.plan_steps`.

        Raises:
            PlanError: ``n`` is not a count, or there is not one timestep for each step.
        """
        if (steps := rules.as_count(n, "n")) == self.steps:
            return self if timesteps is None else self.replace(timesteps=timesteps)
        rows = tuple(zip(*(resampled(self.column(site), steps) for site in self.sites), strict=True))
        source = derived(self.provenance, self.steps, steps)
        return self.replace(steps=steps, methods=rows, timesteps=timesteps, provenance=source)

    def from_step(self, first: int) -> Plan:
        """The plan of a generation that begins at step ``first``, as image to image does: full there, then as it is."""
        rows = [[Method.FULL] * len(self.sites), *self.methods[first + 1 :]]
        times = None if self.timesteps is None else self.timesteps[first:]
        return self.replace(steps=self.steps - first, methods=rows, timesteps=times)

    def at(self, step: int) -> dict[str, Method]:
        """The method of each site at ``step`` (from 0).

        Raises:
            PlanError: the plan has no such step.
        """
        asked: Any = step
        if not isinstance(asked, Integral) or not 0 <= int(asked) < self.steps:
            raise fault("the plan has no such step", "step", step, f"0 to {self.steps - 1}")
        return dict(zip(self.sites, self.methods[step], strict=True))

    def column(self, site: str) -> tuple[Method, ...]:
        """The method of ``site`` at each step.

        Raises:
            PlanError: the plan has no such site.
        """
        asked: Any = site
        if not isinstance(asked, str) or asked not in self.sites:
            close = nearest(asked if isinstance(asked, str) else "", self.sites) or self.sites[:3]
            raise fault("the plan has no such site", "site", site, f"nearest: {', '.join(close)}")
        index = self.sites.index(site)
        return tuple(row[index] for row in self.methods)

    def counts(self) -> dict[Method, int]:
        """How many of the steps x sites cells each method has; 0 is listed too."""
        found = Counter(method for row in self.methods for method in row)
        return {method: found[method] for method in Method}

    @property
    def calls_per_step(self) -> int:
        """How often a step calls the denoiser: twice where the halves of guidance are calls of their own."""
        return calls_per_step(self.cfg)

    @property
    def uses_windows(self) -> bool:
        """Whether any cell is a window."""
        return any(method.windowed for row in self.methods for method in row)

    @property
    def uses_cfg(self) -> bool:
        """Whether any cell shares one half of the batch with the other."""
        return any(method.shares_cfg for row in self.methods for method in row)

    def check_sites(self, known: Sequence[str]) -> None:
        """Compares the plan's sites with those that were found in a denoiser.

        Found sites that the plan does not mention are fine: they run ``full``.

        Raises:
            PlanError: the plan names sites that were not found.
        """
        found = set(known)
        unknown = [site for site in self.sites if site not in found]
        if not unknown:
            return
        hints = [f"{site} (nearest: {', '.join(nearest(site, known)) or 'none'})" for site in unknown[:3]]
        if len(unknown) > len(hints):
            hints.append(f"and {len(unknown) - len(hints)} more")
        raise fault(
            f"{len(unknown)} of the plan's {len(self.sites)} sites are not in the denoiser",
            "sites",
            "; ".join(hints),
            f"{len(found)} sites: {', '.join(known)}" if known else "none: no site was found",
            "list the denoiser's sites with `difa inspect`; the plan may be for another model"
            + ("" if known else ", or Dynamo compiles its modules one by one (see TORCH_LOGS=graph_breaks)"),
        )

    def __str__(self) -> str:
        cells = self.steps * len(self.sites)
        shares = ", ".join(f"{m} {n / cells:.0%}" for m, n in self.counts().items() if n)
        size = f"{self.steps} steps x {len(self.sites)} sites, window +-{self.window}"
        return f"{self.denoiser or 'any denoiser'}: {size}: {shares}"

    def __repr__(self) -> str:
        return f"<Plan {self}>"


def as_plan(value: object) -> Plan:
    """The plan that the option ``plan`` names: a path, a dict, or a Plan already.

    Raises:
        PlanError: it is none of these, or not a valid plan.
    """
    if isinstance(value, Plan):
        return value
    if isinstance(value, Mapping):
        return Plan.from_dict(value)
    if isinstance(value, (str, os.PathLike)):
        if isinstance(value, str) and value.lstrip().startswith("{"):
            raise fault(
                "the option plan is JSON text",
                "plan",
                value,
                "a path, a dict or a Plan",
                "parse it first: Plan.from_dict(json.loads(text))",
            )
        return Plan.load(value)
    raise fault("the option plan is of the wrong type", "plan", value, "a path, a dict or a Plan")


def _moved(error: PlanError, where: str) -> PlanError:
    """The same error, its place inside ``where``."""
    return PlanError(
        error.what,
        where=f"{where}: {error.where}",
        got=error.got,
        allowed=error.allowed,
        todo=error.todo,
    )
