"""FID and Inception Score where it is known what they must say: on handwritten digits, read by a classifier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import difa_fx
from difa_fx.evaluation.images import write_png

digits = pytest.importorskip("digits")


class Reader(nn.Module):
    """The scans' own 8x8 pixels as features, and what the support vector machine makes of them as logits."""

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Return [B, 64] and [B, 10]."""
        grey_B1HW = images_B3HW[:, :1].double() / 127.5 - 1
        features = F.adaptive_avg_pool2d(grey_B1HW, digits.SCAN_SIZE).flatten(1)
        return features, torch.from_numpy(digits.fit_classifier().svc.decision_function(features.numpy()))


def written(place: Path, images_B1HW: Tensor) -> Path:
    place.mkdir()
    for i, image in enumerate(((images_B1HW + 1) * 127.5).round().to(torch.uint8)):
        write_png(place / f"{i:05d}.png", image)
    return place


def test_digits_are_told_from_one_digit_and_from_noise(tmp_path):
    images, labels = digits.digit_images()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    real = written(tmp_path / "real", images[:100])
    sets = {
        "digits": images[100:200],
        "ones": images[labels == 1][:100],
        "noise": torch.rand(100, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1,
    }
    found = {
        name: difa_fx.evaluate(
            written(tmp_path / name, chosen), real=real, features=Reader(), metrics=["fid", "inception_score"]
        )
        for name, chosen in sets.items()
    }
    assert found["digits"].fid < found["ones"].fid / 2
    assert found["digits"].fid < found["noise"].fid / 2
    assert found["digits"].inception_score > 2 * found["ones"].inception_score
    assert found["ones"].inception_score >= 1
    assert found["digits"].inception_score <= 10
    # FID's formula by another route: singular values in place of eigenvalues
    expected = digits.frechet_distance(images[100:200], images[:100])
    assert found["digits"].fid == pytest.approx(expected, rel=0.05)
