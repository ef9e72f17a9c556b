"""A small object that is like a pipeline: a denoiser, a scheduler, and samplers that use them as pipelines do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from models import Case, dit, tensor_of
from torch import Tensor, nn

from difa_fx.plan import CFGOrder, Plan

STEPS = 5
ROWS = ["full", "cached", "window", "full", "cached"]


class Pipe:
    """Holds what a pipeline holds."""

    def __init__(self, transformer: Any, scheduler: Any = None, **others: Any) -> None:
        from diffusers import DDIMScheduler

        self.transformer = transformer
        self.scheduler = scheduler or DDIMScheduler()
        for name, module in others.items():
            setattr(self, name, module)


def inputs(seed: int, batch: int = 2, side: int = 8) -> tuple[Tensor, Tensor]:
    """Latents [B, 4, side, side] and labels [B]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, side, side, generator=generator), torch.randint(10, (batch,), generator=generator)


Denoise = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""The denoiser's output for a step's number, latents, timestep and labels."""


def stepwise(scheduler: Any, denoise: Denoise, seed: int, *, first: int = 0, last: int = STEPS) -> Iterator[Tensor]:
    """The latents after each of the steps from ``first`` on, before ``last``."""
    scheduler.set_timesteps(STEPS)
    latents, labels = inputs(seed)
    for step, t in list(enumerate(scheduler.timesteps))[first:last]:
        noise = denoise(step, latents, t.expand(len(labels)), labels)
        latents = scheduler.step(noise[:, :4], t, latents).prev_sample
        yield latents


def of(pipe: Pipe, name: str = "transformer") -> Denoise:
    """Calls a pipeline's denoiser."""

    def denoise(_: int, latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            return tensor_of(getattr(pipe, name)(latents, timestep=t, class_labels=labels))

    return denoise


def generate(pipe: Pipe, seed: int, *, scheduler: Any = None, **part: int) -> Tensor:
    """A whole generation; the final latents."""
    *_, latents = stepwise(scheduler or pipe.scheduler, of(pipe), seed, **part)
    return latents


def case() -> Case:
    """A denoiser without guidance."""
    from dataclasses import replace

    return replace(dit(layers=2), cfg_order=None)


def plan_for(found: Case, rows: list[str] | None = None, cfg: CFGOrder | None = None) -> Plan:
    """A plan of ``STEPS`` steps."""
    methods = [[row] * len(found.sites) for row in rows or ROWS]
    return Plan(steps=len(methods), sites=found.sites, methods=methods, window=5, cfg=cfg)


def oracle_of(module: nn.Module, plan: Plan, *, first: int = 0) -> Denoise:
    """The eager oracle for a generation whose first call is in full, whatever its row."""
    from oracle import Oracle

    full = plan.replace(methods=[["full"] * len(plan.sites), *plan.methods[1:]])
    oracle, started = Oracle(module, full), False

    def denoise(step: int, latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        nonlocal started
        row = step if started else 0
        started = True
        return tensor_of(oracle(row, latents, timestep=t, class_labels=labels))

    return denoise
