"""Which compilations and generations belong to which denoiser.

Dynamo does not tell a backend what module it compiles, and may run one compiled graph for two modules of one
class.  What does identify a denoiser is its parameters, which Dynamo passes as inputs: the first of them is the
*owner* of its generations.  A compilation is what options say, wherever they stand: graphs that Dynamo shares between
denoisers compiled with equal options belong to one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from difa_fx._torch import WeakIdKeyDictionary
from difa_fx.between_graphs import BetweenGraphs
from difa_fx.callers import Caller, caller
from difa_fx.clock import Clock
from difa_fx.generation_line import Told, reference_to
from difa_fx.generations import Generations
from difa_fx.options import Options
from difa_fx.plan import Plan
from difa_fx.runtime import Runner, owners
from difa_fx.sessions import RunnerStats


@dataclass(eq=False)
class Compilation:
    """All graphs, shapes and denoisers compiled with options that say the same.

    Attributes:
        options: what the user gave.
        runners: one a graph and set of shapes.
        broken: whether Dynamo broke the denoiser into several graphs; they share a clock then.
        found: the sites of all graphs so far.
        between: what the graphs of a broken denoiser hand to one another.
        told: whether it was said that the plan runs elsewhere than it was calibrated.
    """

    options: Options
    runners: list[Runner] = field(default_factory=list)
    broken: bool = False
    found: dict[str, None] = field(default_factory=dict)
    told: bool = False
    between: BetweenGraphs = field(default_factory=BetweenGraphs)
    _denoisers: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    _ownerless: Generations | None = None
    _followed: weakref.WeakKeyDictionary[Caller, Clock] = field(default_factory=weakref.WeakKeyDictionary)

    def tick(self, owner: object, told: Told) -> Clock:
        """The clock of the generation that a call of the denoiser with ``owner`` belongs to, moved on to it."""
        return self.generations_of(owner).tick(told)

    def latest(self, owner: object) -> Clock | None:
        """The clock that the caller's last call moved."""
        return self.generations_of(owner).latest()

    def abandon(self, owner: object) -> None:
        """A call of the caller was refused."""
        self.generations_of(owner).abandon()

    def followed(self) -> Clock | None:
        """In a broken denoiser, the clock that the caller's last graph with a timestep moved."""
        return self._followed.get(caller())

    def follow(self, clock: Clock) -> None:
        """The graphs that this caller runs next belong to ``clock``'s call."""
        self._followed[caller()] = clock

    def join(self, owner: object, clock: Clock) -> None:
        """A graph with the parameter ``owner`` follows ``clock``: it is of the same denoiser."""
        with _lock:
            if owner is None or owner in self._denoisers:
                return
            for generations in list(self._denoisers.values()):  # type: ignore[no-untyped-call]
                if clock in generations.clocks:
                    self._denoisers[owner] = generations
                    return

    def generations_of(self, owner: object) -> Generations:
        """The generations of the denoiser that owns the parameter ``owner``."""
        with _lock:
            if owner is None:
                self._ownerless = self._ownerless or self._fresh(None)
                return self._ownerless
            if owner not in self._denoisers:
                self._denoisers[owner] = self._fresh(owner)
                _announce_again(owner, self._denoisers[owner])
            found = self._denoisers[owner]
            assert isinstance(found, Generations)
            return found

    def _fresh(self, owner: object) -> Generations:
        plan = self.options.plan
        assert plan is not None
        known = None if owner is None else weakref.ref(owner)
        late = (lambda: _announce_late(known())) if known is not None else lambda: False
        return Generations(plan, self._drop, late)

    def _drop(self, clock: Clock) -> None:
        for runner in self.runners:
            runner.drop(clock)

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
        if plan is not None:
            plan.check_sites(list(self.found))

    @property
    def denoisers(self) -> WeakIdKeyDictionary:
        """The generations of each denoiser, by the parameter that owns it."""
        return self._denoisers

    def of(self, owned: Collection[int]) -> Iterator[Generations]:
        """Those of the denoiser with these owners (their ids)."""
        pairs = list(self._denoisers.items())  # type: ignore[no-untyped-call]
        found = {id(value): value for key, value in pairs if id(key) in owned}
        return iter(found.values())


_lock = threading.RLock()
_compilations: list[weakref.ref[Compilation]] = []
_announced: weakref.WeakKeyDictionary[nn.Module, list[_Announcement]] = weakref.WeakKeyDictionary()
"""What was announced for a denoiser before its first call."""
_listeners: weakref.WeakKeyDictionary[nn.Module, Callable[[], bool]] = weakref.WeakKeyDictionary()
"""For denoisers of attached pipelines: announces what their schedulers say that was not heard."""


@dataclass(frozen=True, slots=True)
class _Announcement:
    """A generation that one caller is about to begin; ``scheduler`` is None for a reset."""

    who: weakref.ref[Caller]
    timesteps: tuple[float, ...] = ()
    span: float = 0.0
    scheduler: Callable[[], Any] | None = None
    guessed: bool = False


def compilation_for(options: Options) -> Compilation:
    """The compilation of all that was compiled with options that say the same."""
    with _lock:
        alive = [(ref, found) for ref in _compilations if (found := ref()) is not None]
        _compilations[:] = [ref for ref, _ in alive]
        for _, found in alive:
            if found.options == options:
                return found
        made = Compilation(options)
        _compilations.append(weakref.ref(made))
        return made


def forget() -> None:
    """Dynamo drops all that it compiled: what is compiled from now on has nothing to do with it."""
    with _lock:
        _compilations.clear()


def begin(model: nn.Module) -> None:
    """The caller's next call of ``model`` begins a generation, under whatever plan it is."""
    with _lock:
        told = [a for a in _announced.get(model, ()) if a.who() not in (None, caller()) or a.scheduler is not None]
        _announced[model] = [*told, _Announcement(weakref.ref(caller()))]
        for generations in _generations(model):
            generations.begin()


def announce(
    model: nn.Module, timesteps: Sequence[float], span: float, scheduler: Any, *, guessed: bool = False
) -> None:
    """A scheduler was set for a generation of ``model`` that the caller is about to begin.

    Args:
        model: the denoiser.
        timesteps: the scheduler's.
        span: the steps of the scheduler's training.
        scheduler: it.
        guessed: whether it is no attached pipeline's own, but a copy as it seems.
    """
    with _lock:
        mine = _Announcement(weakref.ref(caller()), tuple(timesteps), span, reference_to(scheduler), guessed)
        kept = [
            a for a in _announced.get(model, ()) if a.who() is not None and _scheduler_of(a) not in (None, scheduler)
        ]
        _announced[model] = [*kept, mine]
        for generations in _generations(model):
            generations.announce(timesteps, span, scheduler, guessed=guessed)


def listen(model: nn.Module, late: Callable[[], bool]) -> None:
    """``model`` belongs to attached pipelines; ``late`` announces what their schedulers say that was not heard."""
    with _lock:
        _listeners[model] = late
        for generations in _generations(model):
            generations.attached = True


def release(model: nn.Module) -> None:
    """Forget the schedulers of ``model``; the plan's timesteps count again."""
    with _lock:
        _listeners.pop(model, None)
        _announced.pop(model, None)
        for generations in _generations(model):
            generations.release()


def runners(model: nn.Module) -> list[Runner]:
    """The runners that served ``model``."""
    owned = _owned(model)
    found = []
    for compilation in _alive():
        mine = all(id(owner) in owned for owner in list(compilation.denoisers))
        found += [runner for runner in compilation.runners if runner.serves(owned, ownerless=mine)]
    return found


def plans(model: nn.Module) -> list[Plan]:
    """The plans that ``model`` was called under so far."""
    owned = _owned(model)
    found = [c.options.plan for c in _alive() if any(True for _ in c.of(owned))]
    return [plan for plan in found if plan is not None]


def stats(model: nn.Module) -> tuple[RunnerStats, ...]:
    """What was compiled and done for ``model``: one record a graph and set of shapes."""
    return tuple(runner.stats for runner in runners(model))


def _alive() -> list[Compilation]:
    return [found for ref in list(_compilations) if (found := ref()) is not None]


def _generations(model: nn.Module) -> list[Generations]:
    owned = _owned(model)
    found = [generations for compilation in _alive() for generations in compilation.of(owned)]
    if next(owners(model), None) is None:
        found += [c._ownerless for c in _alive() if c._ownerless is not None]
    return found


def _owned(model: nn.Module) -> set[int]:
    """The ids of those tensors of ``model`` that own generations; the walk ends where all owners there are were met.

    A denoiser has thousands of tensors, and the first of them is the owner as a rule.
    """
    wanted = {id(owner) for compilation in _alive() for owner in list(compilation.denoisers)}
    found: set[int] = set()
    for tensor in owners(model):
        if found == wanted:
            break
        if id(tensor) in wanted:
            found.add(id(tensor))
    return found


def _models_of(owner: object, among: Mapping[nn.Module, Any]) -> list[nn.Module]:
    return [model for model in list(among) if any(tensor is owner for tensor in owners(model))]


def _announce_again(owner: object, generations: Generations) -> None:
    """Tell a denoiser at its first call what was announced for it before."""
    generations.attached = bool(_models_of(owner, _listeners))
    for model in _models_of(owner, _announced):
        for told in _announced[model]:
            who, scheduler = told.who(), _scheduler_of(told)
            if who is None:
                continue
            if scheduler is not None:
                generations.announce(told.timesteps, told.span, scheduler, guessed=told.guessed, who=who)
            elif told.scheduler is None and not generations.attached:
                generations.begin(who)


def _scheduler_of(told: _Announcement) -> Any:
    return None if told.scheduler is None else told.scheduler()


def _announce_late(owner: object) -> bool:
    return sum(_listeners[model]() for model in _models_of(owner, _listeners)) > 0  # all of them
