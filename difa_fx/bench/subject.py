"""A denoiser and how a sampler calls it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from difa_fx.bench.settings import Size
from difa_fx.plan import CFGOrder


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Subject:
    """A denoiser and how a sampler calls it.

    Attributes:
        size: what it was made from, every field of it filled.
        model: the denoiser, in eval mode and without gradients.
        sites: paths of its self-attentions.
        noise: latents of the images alone: with guidance in one batch, half of what the denoiser is called with.
        conditions: what else it is called with; two of them where guidance is two calls a step.
        cfg: which half, or which call, is the conditional one.
        text: text tokens before and after the image's in its attention.
        time_scale: what a timestep of 0 to 1000 is multiplied with before the denoiser is shown it.
        integer_time: whether it is shown whole numbers.
        noise_axis: axis of the channels of what it yields, of which the first are the noise.
    """

    size: Size
    model: nn.Module
    sites: tuple[str, ...]
    noise: Tensor
    conditions: tuple[Mapping[str, Any], ...]
    cfg: CFGOrder | None
    text: tuple[int, int] = (0, 0)
    time_scale: float = 1.0
    integer_time: bool = True
    noise_axis: int = 1

    @property
    def calls_per_step(self) -> int:
        """How often a step calls the denoiser."""
        return len(self.conditions)

    @property
    def halves(self) -> bool:
        """Whether the batch holds both halves of guidance."""
        return self.cfg is not None and self.calls_per_step == 1

    def shown(self, timestep: float) -> float:
        """``timestep``, 0 to 1000, as the denoiser is shown it."""
        return timestep if self.integer_time else float(torch.tensor(timestep * self.time_scale))

    def arguments(self, latents: Tensor, timestep: float, call: int = 0) -> dict[str, Any]:
        """The keyword arguments of one call.

        Args:
            latents: of the images alone.
            timestep: 0 to 1000.
            call: which of a step's calls.
        """
        batch = torch.cat([latents, latents]) if self.halves else latents
        dtype = torch.int64 if self.integer_time else torch.float32
        time_B = torch.full((batch.shape[0],), self.shown(timestep), dtype=dtype, device=batch.device)
        return {"hidden_states": batch, "timestep": time_B, **self.conditions[call], "return_dict": False}


def timesteps(steps: int) -> tuple[int, ...]:
    """``steps`` timesteps at equal distances, the first 999."""
    return tuple(round(1000 * (1 - step / steps)) - 1 for step in range(steps))
