"""The time of a denoiser's attention, measured by itself: what can be saved at most.

The modules at the sites' paths (projections, attention, output projection) are compiled by Inductor on their own and
run on what they were called with in a call of the whole denoiser.  Nothing of difa_fx takes part, so an efficiency
that is based on it can be below or above 1 for every method, ``cached`` included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from difa_fx.bench.settings import Settings, without_graphs
from difa_fx.bench.subject import Subject
from difa_fx.bench.timing import Contender, Seconds
from difa_fx.device_time import recorded, timed

Key = tuple[object, ...]

_LONG: Final = 0.02
"""Seconds of a run in whose shadow its launches are."""


@dataclass(slots=True, eq=False)
class Alike:
    """Attention modules of one structure.

    Attributes:
        arguments: what the first of them was called with.
        keywords: likewise.
        paths: where they are.
        modules: the modules.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    paths: list[str] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)


def groups_of(subject: Subject, arguments: Mapping[str, Any]) -> list[Alike]:
    """The subject's attention modules by structure, seen in one eager call with ``arguments``."""
    found: dict[Key, Alike] = {}
    handles = []
    for path in subject.sites:
        module = subject.model.get_submodule(path)

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            group = found.setdefault(_key(module, args, kwargs), Alike(args, kwargs))
            group.paths.append(path)
            group.modules.append(module)

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        subject.model(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def _key(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Key:
    parameters = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return (type(module).__name__, parameters, _shapes(args), _shapes(tuple(kwargs.values())), tuple(kwargs))


def _shapes(values: Sequence[Any]) -> Key:
    return tuple(_shapes(v) if isinstance(v, (tuple, list)) else _shape(v) for v in values)


def _shape(value: Any) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else str(type(value))


def contenders(groups: Sequence[Alike], settings: Settings, *, cuda: bool) -> list[Contender]:
    """One contender a group: all of its modules, one after the other.

    On CUDA they are a CUDA graph where they are short, whatever the mode: what can be saved is time of the device, and
    to call so small functions one by one may take longer.
    """

    def attend(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return module(*args, **kwargs)

    compiled = torch.compile(attend, backend=settings.compiler, dynamic=False, mode=without_graphs(settings.mode))
    runs = [_all_of(group, compiled) for group in groups]
    return [Contender(name_of(index), _unlaunched(run) if cuda else run) for index, run in enumerate(runs)]


def _unlaunched(run: Callable[[], None]) -> Callable[[], object]:
    """``run`` on a CUDA device, without what its launches take if they matter."""
    run()  # compiles
    return run if timed(run, cuda=True) > _LONG else recorded(run)


def _all_of(group: Alike, compiled: Callable[..., Any]) -> Callable[[], None]:
    def run() -> None:
        for module in group.modules:
            compiled(module, group.arguments, group.keywords)

    return run


def name_of(index: int) -> str:
    """Name of a group's seconds."""
    return f"attention alone {index}"


def site_seconds(groups: Sequence[Alike], seconds: Seconds) -> list[dict[str, float]]:
    """For each round the seconds of one call of every site's attention."""
    rounds = len(seconds[name_of(0)])
    return [
        {path: seconds[name_of(i)][turn] / len(group.paths) for i, group in enumerate(groups) for path in group.paths}
        for turn in range(rounds)
    ]
