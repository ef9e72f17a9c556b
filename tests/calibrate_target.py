"""What the command line calibrates in tests: a tiny denoiser, four samples, and a sampler that can be slow."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from models import dit, tensor_of
from torch import Tensor, nn

STEPS = 5


def make() -> tuple[nn.Module, list[int], Any]:
    """(denoiser, samples, sampler), as ``difa calibrate module:function`` takes it."""
    return dit(layers=3).model, [1, 2, 3, 4], sample


def sample(model: nn.Module, samples: Sequence[int]) -> Tensor:
    """A few Euler steps; sample i starts from noise of its own."""
    noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in samples]
    latents_BCHW = torch.stack(noise)
    labels = torch.tensor([*samples, *[10] * len(samples)])
    for step in range(STEPS):
        time.sleep(float(os.environ.get("DIFA_TEST_SLEEP", "0")))
        time_B = torch.full((2 * len(samples),), 999 - 200 * step)
        output = tensor_of(model(torch.cat([latents_BCHW] * 2), timestep=time_B, class_labels=labels))
        cond, uncond = output[:, :4].chunk(2)
        latents_BCHW = latents_BCHW - 0.1 * (uncond + 2 * (cond - uncond))
    return latents_BCHW
