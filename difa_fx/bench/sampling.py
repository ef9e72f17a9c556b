"""A generation: an Euler sampler with classifier-free guidance around any denoiser.

Its own work is a few additions of latents a step, the same whoever denoises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from difa_fx.bench.subject import Subject, timesteps

GUIDANCE: Final = 3.0


def _quiet(step: int, call: int, timestep: int) -> None:
    """Nothing to be told."""


def _begin() -> None:
    """Nothing to forget."""


@dataclass(frozen=True, slots=True, eq=False)
class Denoiser:
    """A way to run a denoiser.

    Attributes:
        call: the denoiser, with the arguments that :meth:`Subject.arguments` makes.
        begin: called before each generation.
        tell: told step, call of the step and timestep before each call.
        kept: bytes of state that it holds now; None where that is not known.
    """

    call: Callable[..., Any]
    begin: Callable[[], object] = _begin
    tell: Callable[[int, int, int], object] = _quiet
    kept: Callable[[], int] | None = None


def generate(subject: Subject, denoiser: Denoiser, steps: int) -> Tensor:
    """The latents after ``steps`` steps from the subject's noise."""
    latents = subject.noise
    denoiser.begin()
    for step, timestep in enumerate(timesteps(steps)):
        made = []
        for call in range(subject.calls_per_step):
            denoiser.tell(step, call, timestep)
            made.append(noise_of(subject, denoiser.call(**subject.arguments(latents, timestep, call))))
        latents = latents - guided(subject, made) / steps
    return latents


def noise_of(subject: Subject, output: Any) -> Tensor:
    """The noise in what a denoiser yields; some yield its variance too.  A copy: CUDA graphs reuse their outputs."""
    value: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return value.narrow(subject.noise_axis, 0, subject.noise.shape[subject.noise_axis]).clone()


def guided(subject: Subject, made: list[Tensor]) -> Tensor:
    """The noise that the sampler goes on with, from one call or two."""
    if subject.cfg is None:
        return made[0]
    first, second = made if subject.calls_per_step == 2 else made[0].chunk(2)
    conditional, other = (first, second) if subject.cfg.startswith("cond") else (second, first)
    return other + GUIDANCE * (conditional - other)


def latents_at(subject: Subject, step: int) -> Tensor:
    """Latents that move a little from step to step, without a denoiser."""
    turn = 0.02 * step
    return math.cos(turn) * subject.noise + math.sin(turn) * subject.noise.flip(-1)


def relative_l1(value: Tensor, reference: Tensor) -> float | None:
    """Sum of absolute differences, over that of the reference's absolute values; None where that is no number."""
    own, other = value.detach().double(), reference.detach().double()
    found = float((own - other).abs().sum() / other.abs().sum())
    return found if math.isfinite(found) else None
