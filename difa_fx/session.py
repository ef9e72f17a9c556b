"""What a user may ask of a compiled denoiser: forget a generation, and tell what was done."""

from __future__ import annotations

from typing import Any

from torch import nn

from difa_fx import registry
from difa_fx.errors import AttachError
from difa_fx.sessions import RunnerStats

DENOISERS = ("transformer", "transformer_2", "unet", "unet_2", "denoiser", "model")
"""Attributes of a pipeline that hold its denoisers."""


def reset(target: Any) -> None:
    """The next call that this thread (or task) makes of a denoiser begins a generation; state it had is dropped.

    Args:
        target: the denoiser, compiled or not, a compiled method of it, or a pipeline.

    Raises:
        AttachError: it is none of these.
    """
    for model in denoisers_of(target):
        registry.begin(model)


def stats(target: Any) -> tuple[RunnerStats, ...]:
    """What was compiled and done for a denoiser: one record a graph and set of shapes.

    Args:
        target: the denoiser, compiled or not, a compiled method of it, or a pipeline.

    Raises:
        AttachError: it is none of these.
    """
    return tuple(record for model in denoisers_of(target) for record in registry.stats(model))


def denoisers_of(target: Any) -> tuple[nn.Module, ...]:
    """The modules that ``target`` stands for, as they were before ``torch.compile``.

    Raises:
        AttachError: there is none.
    """
    module = module_of(target)
    if module is not None:
        return (module,)
    found = [module_of(getattr(target, name, None)) for name in DENOISERS]
    modules = tuple(dict.fromkeys(module for module in found if module is not None))
    if not modules:
        raise AttachError(
            "this is no denoiser, and has none",
            where="difa_fx",
            got=type(target).__name__,
            allowed="a module, what torch.compile made of one or of its method, or a pipeline with "
            + ", ".join(DENOISERS),
            todo="pass the denoiser itself",
        )
    return modules


def module_of(target: Any) -> nn.Module | None:
    """The module behind what ``torch.compile`` made of it or of one of its methods; None if there is none."""
    for _ in range(_MAX_WRAPPED):
        inner = _inside(target)
        if inner is None:
            break
        target = inner
    return target if isinstance(target, nn.Module) else None


_MAX_WRAPPED = 8


def _inside(target: Any) -> Any:
    """What a wrapper of ``torch.compile`` or ``functools``, or a bound method, is made of; None if it is none."""
    if isinstance(target, nn.Module):
        return vars(target).get("_modules", {}).get("_orig_mod")
    if not callable(target):
        return None
    for name in ("_torchdynamo_orig_callable", "__self__", "func", "__wrapped__"):
        inner = getattr(target, name, None)
        if inner is not None:
            return inner
    return None
