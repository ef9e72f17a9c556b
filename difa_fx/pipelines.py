"""diffusers pipelines: compile their denoisers under a plan and listen to their schedulers.

The scheduler knows what a compiled graph cannot: that a generation begins, and which timesteps it will have.
:func:`attach` hears its ``set_timesteps``, so that an interrupted generation, another number of steps or a second
pipeline can never meet old state.  There is one attachment a denoiser, for any number of pipelines.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from difa_fx import elsewhere, hearing, registry
from difa_fx.clock import other_steps
from difa_fx.errors import AttachError
from difa_fx.options import Options, parse_options
from difa_fx.plan import Plan, as_plan
from difa_fx.session import DENOISERS, module_of
from difa_fx.unseen import Watched

_PARTIAL = ("strength", "denoising_start", "denoising_end")
"""Arguments of a pipeline's call with which it runs a part of the scheduled steps."""


@dataclass(eq=False)
class _Attachment:
    """A denoiser that attached pipelines use.

    Attributes:
        before: its compiled call before the first of them came.
        options: what it was compiled with here; None where it was compiled before.
        pipes: the pipelines.
        heard: schedulers whose timesteps were announced.
    """

    denoiser: weakref.ref[nn.Module]
    before: Any
    options: Options | None
    pipes: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    heard: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)

    @property
    def plan(self) -> Plan | None:
        """The plan that it was attached with."""
        return None if self.options is None else self.options.plan


_attachments: weakref.WeakKeyDictionary[nn.Module, _Attachment] = weakref.WeakKeyDictionary()
_pipes: weakref.WeakKeyDictionary[Any, Mapping[str, Any]] = weakref.WeakKeyDictionary()
"""Attached pipelines, and what stood in their attributes before."""


def attach(pipe: Any, plan: object = None, *, mode: str | None = None, **options: Any) -> Any:
    """Compile a pipeline's denoisers with ``backend="difa"`` and let its scheduler say when a generation begins.

    A denoiser that was compiled with ``backend="difa"`` before, or is attached through another pipeline, stays as it
    is when no plan is given.  Where a pipeline has several denoisers, each for a part of the steps, the plan is for all
    steps, and its rows go to the denoiser that runs them.

    Args:
        pipe: a diffusers pipeline, or any object with a ``transformer`` or ``unet`` and a ``scheduler`` that has
            ``set_timesteps`` and ``timesteps``.
        plan: a path, dict or :class:`~difa_fx.plan.Plan`.
        mode: torch's own, for instance ``reduce-overhead``.
        options: the backend's other options.

    Returns:
        ``pipe``.

    Raises:
        AttachError: the object is no pipeline, is attached already, has its denoiser spread over devices, or shares
            it with a pipeline that is attached under another plan.
        PlanError: the plan is malformed; later, from the pipeline, that it has another number of steps.
        OptionError: an option is unknown or wrong.
    """
    if pipe in _pipes:
        raise AttachError(
            "this pipeline is attached already",
            where="difa_fx.attach",
            got=type(pipe).__name__,
            todo="call difa_fx.detach(pipe) first",
        )
    parts_of(pipe)
    places = _places(pipe)
    for found in places.values():
        refuse_parallel(module_of(found))
    settings = {"plan": as_plan(plan), "mode": mode, **options} if plan is not None else None
    asked = None if settings is None else parse_options(settings)
    for name, found in places.items():
        _check(name, found, asked)
    unwrapped = {}
    for name, found in places.items():
        denoiser = module_of(found)
        assert denoiser is not None
        if asked is not None and found is not denoiser:
            setattr(pipe, name, denoiser)  # what torch.compile made of it would go round what is compiled here
            unwrapped[name] = found
        _attachment(denoiser, asked, settings).pipes.add(pipe)
        registry.listen(denoiser, partial(_hear_late, weakref.ref(denoiser)))
    _pipes[pipe] = unwrapped
    if asked is not None and asked.plan is not None:
        elsewhere.tell(asked.plan, [elsewhere.other_scheduler(asked.plan, type(pipe.scheduler).__name__)], stacklevel=2)
    hearing.hear(pipe.scheduler, _hear)
    return pipe


def _places(pipe: Any) -> dict[str, Any]:
    """A pipeline's denoisers, compiled or not, by attribute."""
    return {name: found for name in DENOISERS if module_of(found := getattr(pipe, name, None)) is not None}


def _check(name: str, found: Any, asked: Options | None) -> None:
    """Raise AttachError where a denoiser cannot be attached."""
    denoiser = module_of(found)
    assert denoiser is not None
    known = _attachments.get(denoiser)
    if asked is not None and known is not None and known.options != asked:
        raise AttachError(
            "another pipeline is attached to this denoiser under another plan or other options",
            where=f"difa_fx.attach, {name}",
            got=f"{asked.plan}",
            allowed=f"{known.plan}" if known.plan is not None else "no plan: it was compiled before",
            todo="detach the other pipeline first, attach this one without a plan, or give it a denoiser of its own",
        )
    compiled = found is not denoiser or denoiser._compiled_call_impl is not None or known is not None
    if asked is None and not compiled:
        raise AttachError(
            "there is no plan, and the denoiser is not compiled",
            where=f"difa_fx.attach, {name}",
            got="plan=None",
            allowed="a plan, or a denoiser compiled with backend='difa'",
            todo="call difa_fx.attach(pipe, plan)",
        )


def _attachment(denoiser: nn.Module, asked: Options | None, settings: Mapping[str, Any] | None) -> _Attachment:
    """The denoiser's attachment, made and compiled if it is the first."""
    found = _attachments.get(denoiser)
    if found is not None:
        return found
    made = _Attachment(weakref.ref(denoiser), denoiser._compiled_call_impl, asked)
    if settings is not None:
        denoiser.compile(backend="difa", options=dict(settings))
    if denoiser._compiled_call_impl is not None:
        strict = asked is None or asked.strict
        denoiser._compiled_call_impl = Watched(denoiser._compiled_call_impl, denoiser, strict=strict)
    _attachments[denoiser] = made
    return made


def refuse_parallel(denoiser: Any) -> None:
    """Raise AttachError where diffusers spreads one sample's tokens or heads over devices.

    Its hooks stand between the layers then, Dynamo compiles part by part, and the parts cannot tell what they are.
    """
    if getattr(denoiser, "_parallel_config", None) is not None:
        raise AttachError(
            "the denoiser is spread over devices (enable_parallelism), and a plan cannot be rewritten through that",
            where="difa_fx.attach",
            got=type(denoiser._parallel_config).__name__,
            allowed="one whole denoiser on each device",
            todo="give each device the whole denoiser and a share of the prompts",
        )


def detach(pipe: Any) -> Any:
    """Undo :func:`attach`: the denoisers as they were before, the scheduler no longer heard, all state dropped.

    What another attached pipeline uses, too, stays as it is until that is detached.

    Raises:
        AttachError: the pipeline is not attached.
    """
    if pipe not in _pipes:
        raise AttachError(
            "this pipeline is not attached",
            where="difa_fx.detach",
            got=type(pipe).__name__,
            todo="call difa_fx.attach(pipe, plan) first",
        )
    for name, before in _pipes.pop(pipe).items():
        if getattr(pipe, name, None) is module_of(before):
            setattr(pipe, name, before)
    for denoiser, attachment in list(_attachments.items()):
        attachment.pipes.discard(pipe)
        if not attachment.pipes:
            registry.release(denoiser)
            denoiser._compiled_call_impl = attachment.before
            del _attachments[denoiser]
    if not _attachments:
        hearing.stop()
    return pipe


def is_attached(pipe: Any) -> bool:
    """Whether ``pipe`` is attached."""
    return pipe in _pipes


def parts_of(pipe: Any) -> tuple[nn.Module, Any]:
    """A pipeline's denoiser, the first if it has several, and its scheduler.

    Raises:
        AttachError: it has none.
    """
    denoiser = next(map(module_of, _places(pipe).values()), None)
    if denoiser is None:
        raise AttachError(
            "the pipeline has no denoiser",
            where="difa_fx.attach",
            got=type(pipe).__name__,
            allowed=f"an attribute {', '.join(DENOISERS)} that is a module",
            todo="compile your module with torch.compile(backend='difa') and call difa_fx.reset before a generation",
        )
    scheduler = getattr(pipe, "scheduler", None)
    if not callable(getattr(scheduler, "set_timesteps", None)):
        raise AttachError(
            "the pipeline has no scheduler to listen to",
            where="difa_fx.attach",
            got=type(scheduler).__name__,
            allowed="an object with set_timesteps and timesteps",
            todo="call difa_fx.reset(denoiser) before each generation instead",
        )
    return denoiser, scheduler


def _hear(scheduler: Any) -> None:
    """A scheduler was set to its timesteps: an attached pipeline's own, a copy of one, or a stranger of its class."""
    attached = list(_attachments.items())
    own = [(d, a) for d, a in attached if any(pipe.scheduler is scheduler for pipe in a.pipes)]
    alike = [(d, a) for d, a in attached if any(type(pipe.scheduler) is type(scheduler) for pipe in a.pipes)]
    for denoiser, attachment in own or alike:
        _announce(denoiser, attachment, scheduler, guessed=not own)


def _hear_late(known: weakref.ref[nn.Module]) -> bool:
    """Announce what took the place of an attached pipeline's scheduler and was set before it was heard."""
    denoiser = known()
    attachment = None if denoiser is None else _attachments.get(denoiser)
    if denoiser is None or attachment is None:
        return False
    found = [pipe.scheduler for pipe in attachment.pipes if pipe.scheduler not in attachment.heard]
    set_already = [scheduler for scheduler in found if hearing.was_set(scheduler)]
    for scheduler in set_already:
        hearing.hear(scheduler, _hear)
        _announce(denoiser, attachment, scheduler)
    return bool(set_already)


def _announce(denoiser: nn.Module, attachment: _Attachment, scheduler: Any, *, guessed: bool = False) -> None:
    timesteps = hearing.timesteps_of(scheduler)
    if not guessed:
        _check_pipes(denoiser, attachment, scheduler, timesteps)
    attachment.heard.add(scheduler)
    registry.announce(denoiser, timesteps, hearing.training_steps(scheduler), scheduler, guessed=guessed)


def _check_pipes(denoiser: nn.Module, attachment: _Attachment, scheduler: Any, timesteps: list[float]) -> None:
    """What can be said of a generation before its first call.

    Raises:
        AttachError: the pipeline has another denoiser than it was attached with.
        PlanError: it will have another number of steps than the plan.
    """
    plans = [attachment.plan] if attachment.plan is not None else registry.plans(denoiser)
    for pipe in [pipe for pipe in attachment.pipes if pipe.scheduler is scheduler]:
        used = [module_of(found) for found in _places(pipe).values()]
        if denoiser not in used or any(module not in _attachments for module in used):
            raise AttachError(
                "the pipeline's denoiser was replaced after it was attached, and the new one is not compiled",
                where=type(pipe).__name__,
                got=", ".join(type(module).__name__ for module in used) or "none",
                allowed="the denoisers that it was attached with",
                todo="call difa_fx.detach(pipe), and difa_fx.attach(pipe, plan) again",
            )
        parts = set(_PARTIAL).intersection(_arguments(pipe))
        for plan in plans:
            if len(timesteps) != plan.steps and not parts:
                raise other_steps(plan.steps, timesteps)


def _arguments(pipe: Any) -> tuple[str, ...]:
    """The names of a pipeline's arguments; of an object that cannot be called, all that would change its steps."""
    return tuple(inspect.signature(pipe).parameters) if callable(pipe) else _PARTIAL
