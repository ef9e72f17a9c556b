"""Which compilations and clocks belong to which denoiser.

Dynamo does not tell a backend what module it compiles, and may run one compiled graph for two modules of one
class.  What does identify a denoiser is its parameters, which Dynamo passes as inputs: the first of them is the
*owner* of a clock and of a session's state.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from difa_fx._torch import WeakIdKeyDictionary
from difa_fx.clock import Clock
from difa_fx.options import Options
from difa_fx.plan import Plan
from difa_fx.runtime import Runner, owners
from difa_fx.sessions import RunnerStats


@dataclass(eq=False)
class Compilation:
    """One ``torch.compile`` call: its options, and all graphs, shapes and denoisers compiled under it.

    Attributes:
        options: what the user gave.
        key: the object that identifies the call.
        runners: one a graph and set of shapes.
        broken: whether Dynamo broke the denoiser into several graphs; they share one clock then.
        clocks: one a denoiser, by the parameter that owns it.
        ownerless: the clock of denoisers without parameters, or of all graphs of a broken one.
        found: the sites of all graphs so far.
    """

    options: Options
    key: Mapping[str, Any] | None
    runners: list[Runner] = field(default_factory=list)
    broken: bool = False
    found: dict[str, None] = field(default_factory=dict)
    clocks: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    ownerless: Clock | None = None

    def clock_of(self, owner: object) -> Clock:
        """The clock of the denoiser that owns the parameter ``owner``, made at its first call."""
        plan = self.options.plan
        assert plan is not None
        fresh = Clock(plan.steps, plan.timesteps, calls=plan.calls_per_step)
        if owner is None or self.broken:
            self.ownerless = self.ownerless or fresh
            if owner is not None and owner not in self.clocks:
                self._join(owner, self.ownerless)
            return self.ownerless
        if owner not in self.clocks:
            self._join(owner, fresh)
        found = self.clocks[owner]
        assert isinstance(found, Clock)
        return found

    def _join(self, owner: object, clock: Clock) -> None:
        self.clocks[owner] = clock
        announced = _announced(owner)
        if announced is not None and clock.position < 0:
            clock.begin(*announced)

    @property
    def guided(self) -> bool:
        """Whether the plan's batch holds two halves of guidance."""
        plan = self.options.plan
        return plan is not None and plan.cfg is not None and plan.calls_per_step == 1

    def check_sites(self) -> None:
        """Once every graph of a broken denoiser was seen: whether they have all sites of the plan.

        Raises:
            PlanError: the plan names a site that none of them has.
        """
        plan = self.options.plan
        if plan is not None and self.ownerless is not None and self.ownerless.position >= 0:
            plan.check_sites(list(self.found))

    def is_conditional_half(self, owner: object, batch: int | None) -> bool:
        """Whether a generation of ``owner`` runs at twice ``batch``: guidance ends in the middle of it."""
        if not self.guided or batch is None or owner not in self.clocks:
            return False
        clock = self.clocks[owner]
        sessions = [r.session_of(owner) for r in self.runners if r.attention.inputs.batch == 2 * batch]
        return any(session is not None and session.ran(clock.position) for session in sessions)

    def clocks_for(self, owned: Collection[int]) -> Iterator[Clock]:
        """The clocks, in this compilation, of the denoiser with these owners (their ids)."""
        return (clock for owner, clock in self.clocks.items() if id(owner) in owned)  # type: ignore[no-untyped-call]


_compilations: weakref.WeakValueDictionary[int, Compilation] = weakref.WeakValueDictionary()
_begun: weakref.WeakKeyDictionary[nn.Module, tuple[Sequence[float] | None, float]] = weakref.WeakKeyDictionary()
"""Denoisers whose next generation was announced, and the scheduler's timesteps and span."""


def compilation_for(key: Mapping[str, Any] | None, options: Options) -> Compilation:
    """The compilation whose ``options=`` argument is the object ``key``; one a ``torch.compile`` call."""
    found = _compilations.get(id(key)) if key is not None else None
    if found is None or found.key is not key:
        found = Compilation(options, key)
        _compilations[id(key) if key is not None else id(found)] = found
    return found


def begin(model: nn.Module, timesteps: Sequence[float] | None = None, span: float = 0.0) -> None:
    """Tell every clock of ``model``, made already or later, that a generation is about to start.

    Args:
        model: the denoiser.
        timesteps: its scheduler's.
        span: the steps of the scheduler's training.
    """
    if timesteps is not None or model not in _begun:
        _begun[model] = (timesteps, span)
    owned = _owned(model)
    for compilation in list(_compilations.values()):
        for clock in list(compilation.clocks_for(owned)):
            clock.begin(timesteps, span)
        if compilation.ownerless is not None and next(owners(model), None) is None:
            compilation.ownerless.begin(timesteps, span)
    for runner in _runners(owned):
        runner.drop_state(owned)


def release(model: nn.Module) -> None:
    """Forget the scheduler of ``model``; its clocks go by the plan again."""
    first = next(owners(model), None)
    for other in list(_begun):
        if other is model or (first is not None and next(owners(other), None) is first):
            del _begun[other]
    owned = _owned(model)
    for compilation in list(_compilations.values()):
        plan = compilation.options.plan
        for clock in list(compilation.clocks_for(owned)):
            clock.release(plan.timesteps if plan else None)


def runners(model: nn.Module) -> list[Runner]:
    """The runners that served ``model``."""
    return _runners(_owned(model))


def plans(model: nn.Module) -> list[Plan]:
    """The plans that ``model`` was called under so far."""
    owned = _owned(model)
    found = [c.options.plan for c in list(_compilations.values()) if any(c.clocks_for(owned))]
    return [plan for plan in found if plan is not None]


def _runners(owned: Collection[int]) -> list[Runner]:
    found = []
    for compilation in list(_compilations.values()):
        mine = any(True for _ in compilation.clocks_for(owned)) or not compilation.clocks
        found += [runner for runner in compilation.runners if runner.serves(owned, ownerless=mine)]
    return found


def _owned(model: nn.Module) -> set[int]:
    """The ids of those tensors of ``model`` that own a clock; the walk ends where all owners there are were met.

    A denoiser has thousands of tensors, and the first of them is the owner as a rule.
    """
    wanted = {id(owner) for compilation in list(_compilations.values()) for owner in compilation.clocks}
    found: set[int] = set()
    for tensor in owners(model):
        if found == wanted:
            break
        if id(tensor) in wanted:
            found.add(id(tensor))
    return found


def _announced(owner: object) -> tuple[Sequence[float] | None, float] | None:
    """What was announced for the denoiser that ``owner`` belongs to; by its scheduler, if that did."""
    found = [told for model, told in list(_begun.items()) if any(tensor is owner for tensor in owners(model))]
    return max(found, key=lambda told: told[0] is not None, default=None)


def stats(model: nn.Module) -> tuple[RunnerStats, ...]:
    """What was compiled and done for ``model``: one record a graph and set of shapes."""
    return tuple(runner.stats for runner in runners(model))
