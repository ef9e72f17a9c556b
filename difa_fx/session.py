"""What a user may ask of a compiled denoiser: forget a generation, and tell what was done."""

from __future__ import annotations

from torch import nn

from difa_fx import registry
from difa_fx.sessions import RunnerStats


def reset(model: nn.Module) -> None:
    """The next call of ``model`` begins a generation; all state is dropped.

    Args:
        model: the denoiser, compiled or the module that was compiled.
    """
    registry.begin(model)


def stats(model: nn.Module) -> tuple[RunnerStats, ...]:
    """What was compiled and done for ``model``: one record a graph and set of shapes.

    Args:
        model: the denoiser, compiled or the module that was compiled.
    """
    return registry.stats(model)
