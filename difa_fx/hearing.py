"""Schedulers that are heard: whoever sets one to its timesteps is about to begin a generation.

The method of the *class* is wrapped while pipelines are attached, so that a copy of a scheduler, or one that takes its
place, is heard as well, and no scheduler carries anything that a copy or a pickle could take along.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

Listener = Callable[[Any], None]

_lock = threading.RLock()
_classes: dict[type, Any] = {}
"""Classes whose ``set_timesteps`` is wrapped, and what they themselves had; None where it is inherited."""
_objects: dict[int, tuple[Any, Any]] = {}
"""Likewise objects that have a function of their own under that name."""


def hear(scheduler: Any, listener: Listener) -> None:
    """Tell ``listener`` of each ``set_timesteps`` of schedulers like this one."""
    with _lock:
        own = getattr(scheduler, "__dict__", {}).get("set_timesteps")
        if own is not None and id(scheduler) not in _objects:
            _objects[id(scheduler)] = scheduler, own
            scheduler.set_timesteps = _wrapped(own, listener, scheduler)
        kind = type(scheduler)
        if own is None and kind not in _classes:
            _classes[kind] = vars(kind).get("set_timesteps")
            kind.set_timesteps = _wrapped(kind.set_timesteps, listener)


def is_heard(scheduler: Any) -> bool:
    """Whether its ``set_timesteps`` is heard."""
    return type(scheduler) in _classes or id(scheduler) in _objects


def stop() -> None:
    """Nobody is heard any more; all is as it was."""
    with _lock:
        for kind, own in _classes.items():
            if own is None:
                del kind.set_timesteps  # type: ignore[attr-defined]
            else:
                kind.set_timesteps = own  # type: ignore[attr-defined]
        for scheduler, own in _objects.values():
            scheduler.set_timesteps = own
        _classes.clear()
        _objects.clear()


def timesteps_of(scheduler: Any) -> list[float]:
    """What a scheduler was set to."""
    timesteps = getattr(scheduler, "timesteps", None)
    return [] if timesteps is None else torch.as_tensor(timesteps).detach().double().reshape(-1).cpu().tolist()


def was_set(scheduler: Any) -> bool:
    """Whether a scheduler was set to the timesteps of a generation; before, it has those of its training."""
    count = len(timesteps_of(scheduler))
    return (
        count > 0
        and getattr(scheduler, "num_inference_steps", count) is not None
        and count != training_steps(scheduler)
    )


def training_steps(scheduler: Any) -> float:
    """The steps of a scheduler's training; some denoisers are shown timesteps as a share of them.  0 when unknown."""
    count = getattr(getattr(scheduler, "config", None), "num_train_timesteps", 0)
    return float(count) if isinstance(count, (int, float)) else 0.0


def _wrapped(original: Callable[..., Any], listener: Listener, scheduler: Any = None) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        listener(args[0] if scheduler is None else scheduler)
        return result

    return set_timesteps
