"""What evaluation is tested with: folders of small images, and networks of which everything is known."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import difa_fx
from difa_fx.evaluation import Evaluation
from difa_fx.evaluation.images import write_png

SIZE = 16
COUNT = 23
"""Images in a folder: batches of 8, the last one shorter."""


def noise(seed: int, *, size: int = SIZE, channels: int = 3) -> Tensor:
    """An image with some structure, [C, H, W] uint8, of nothing but ``seed``."""
    coarse = torch.rand(1, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, size=(size, size), mode="bilinear")[0] * 255).round().to(torch.uint8)


def folder_of(place: Path, count: int, *, seed: int = 0, shift: int = 0, size: int = SIZE) -> Path:
    """A folder of ``count`` images; ``shift`` adds to each value, so two folders can differ by a known amount."""
    place.mkdir(parents=True)
    for i in range(count):
        image = (noise(1000 * seed + i, size=size).int() + shift).clamp(0, 255).to(torch.uint8)
        write_png(place / f"{i:05d}.png", image)
    return place


class Features(nn.Module):
    """Six features an image, which serve as logits too; counts its calls, and can be slow."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.calls = 0

    def forward(self, images_B3HW: Tensor) -> Tensor:
        assert images_B3HW.dtype == torch.uint8
        self.calls += 1
        time.sleep(float(os.environ.get("DIFA_TEST_SLEEP", "0")))
        pooled = F.adaptive_avg_pool2d(images_B3HW.float() / 255, 4).flatten(1)
        return F.linear(pooled, self.weight)


class FeaturesAndLogits(Features):
    """The pair of both, of different widths."""

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        features = super().forward(images_B3HW)
        return features, 3 * features[:, :4]


class Logits(Features):
    """The second of that pair alone."""

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return 3 * super().forward(images_B3HW)[:, :4]


def features() -> Features:
    """As ``--features module:function`` takes it."""
    return Features()


def distance(images_B3HW: Tensor, uncompressed_B3HW: Tensor) -> Tensor:
    """A stand-in for LPIPS: the mean squared difference of each image."""
    return (images_B3HW - uncompressed_B3HW).square().flatten(1).mean(1)


def perceptual() -> object:
    """As ``--perceptual module:function`` takes it."""
    return distance


def letters(images_B3HW: Tensor, prompts: list[str]) -> Tensor:
    """A stand-in for CLIP: letters of the prompt times the mean of the image."""
    return torch.tensor([float(len(text)) for text in prompts]) * images_B3HW.float().mean((1, 2, 3))


def clip() -> object:
    """As ``--clip module:function`` takes it."""
    return letters


def draw(samples: list[int], seeds: list[int]) -> Tensor:
    """Images in [0, 1] of sample and seed, for ``generate_images``; can be slow."""
    time.sleep(float(os.environ.get("DIFA_TEST_SLEEP", "0")))
    return torch.stack([noise(7 * int(s) + seed).float() / 255 for s, seed in zip(samples, seeds, strict=True)])


def three_folders(place: Path) -> dict[str, Path]:
    """Images to judge, the same ones before they were changed a little, and fewer that stand for real ones."""
    return {
        "images": folder_of(place / "images", COUNT, shift=5),
        "uncompressed": folder_of(place / "uncompressed", COUNT),
        "real": folder_of(place / "real", 19, seed=7),
    }


def evaluate(folder: Path, **options: Any) -> Evaluation:
    """``difa_fx.evaluate`` in small batches, silently."""
    return difa_fx.evaluate(folder, **{"batch_size": 8, "progress": False} | options)
