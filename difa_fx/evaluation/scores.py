"""All rows, in the order of the images, to one number a metric.

FID and Inception Score are computed by torchmetrics, fed with the features that were measured in place of images, so
they are the numbers that torchmetrics gives for the same batches.

Shape letters: B images of a batch, F features, K classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from difa_fx.plan_io import FrozenDict

#: Every metric by name, with the input that it needs besides the images.
METRICS: Final[Mapping[str, str | None]] = FrozenDict(
    {
        "fid": "real",
        "inception_score": None,
        "clip_score": "prompts",
        "psnr": "uncompressed",
        "ssim": "uncompressed",
        "lpips": "uncompressed",
        "relative_l1": "uncompressed",
    }
)

#: Parts that Inception Score is averaged over, as in torchmetrics and in the paper that made it (arXiv 1606.03498).
SPLITS: Final = 10

Rows: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found; None where a metric was left out.

    Attributes:
        images: how many were judged.
        real_images: how many real ones they were compared with; FID falls as either number grows.
        fid: Frechet distance of Inception features (arXiv 1706.08500), 0 and up, lower is nearer to the real images.
        inception_score: mean over 10 parts, 1 to the number of classes, higher is better.
        inception_score_std: standard deviation over these parts.
        clip_score: 100 times the cosine of image and prompt, averaged, at least 0, higher is better.
        psnr: of the mean squared error over all images, in dB, to the uncompressed ones; infinite for equal images.
        ssim: mean structural similarity to the uncompressed ones, 1 for equal images.
        lpips: mean perceptual distance to the uncompressed ones, 0 for equal images.
        relative_l1: sum of absolute differences to the uncompressed ones, as a share of the sum of their values.
        skipped: metric to the reason why it was left out.
    """

    images: int
    real_images: int | None = None
    fid: float | None = None
    inception_score: float | None = None
    inception_score_std: float | None = None
    clip_score: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    relative_l1: float | None = None
    skipped: Mapping[str, str] = field(default_factory=lambda: FrozenDict({}))

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values; infinity, which JSON lacks, is the text ``"inf"``."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        found = {name: "inf" if value == math.inf else value for name, value in found.items()}
        return found | {"skipped": dict(self.skipped)}


def fid(real: Iterable[Tensor], images: Iterable[Tensor]) -> float:
    """The distance of two sets of features that come in batches, [B, F] each."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric: FrechetInceptionDistance | None = None
    for is_real, batches in ((True, real), (False, images)):
        for features_BF in batches:
            metric = metric or FrechetInceptionDistance(_Measured(features_BF.shape[1]), sync_on_compute=False)
            metric.update(features_BF, real=is_real)
    assert metric is not None
    return float(metric.compute())


def inception_score(logits: Iterable[Tensor], *, seed: int) -> tuple[float, float]:
    """Mean and standard deviation over ``SPLITS`` parts of all images, shuffled under ``seed``.

    Args:
        logits: batches of [B, K].
        seed: torchmetrics shuffles by the global generator, which is set to this meanwhile.
    """
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `InceptionScore` will save all", category=UserWarning)
        metric = InceptionScore(_Measured(0), splits=SPLITS, sync_on_compute=False)
    for logits_BK in logits:
        metric.update(logits_BK)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return float(mean), float(std)


def _psnr(total: Mapping[str, float]) -> float:
    """``10 log10(255^2 / mean squared error)``."""
    error = total["squared"] / total["values"]
    return 10 * math.log10(255**2 / error) if error else math.inf


def _relative_l1(total: Mapping[str, float]) -> float:
    if total["reference"] == 0:  # all black: any difference is infinitely large
        return math.inf if total["absolute"] else 0.0
    return total["absolute"] / total["reference"]


#: Metrics that are a function of the sums of rows and of the number of images.
_OF_SUMS: Final[Mapping[str, tuple[tuple[str, ...], Callable[[Mapping[str, float]], float]]]] = FrozenDict(
    {
        "clip_score": (("clip",), lambda total: max(total["clip"] / total["images"], 0.0)),
        "psnr": (("squared", "values"), _psnr),
        "ssim": (("ssim",), lambda total: total["ssim"] / total["images"]),
        "lpips": (("lpips",), lambda total: total["lpips"] / total["images"]),
        "relative_l1": (("absolute", "reference"), _relative_l1),
    }
)


def of_sums(metric: str, rows: Iterable[Rows]) -> float:
    """A metric of rows that come in batches; their sums are taken image by image in float64, in order."""
    names, formula = _OF_SUMS[metric]
    total = dict.fromkeys((*names, "images"), 0.0)
    for batch in rows:
        for name in names:
            # fsum of a running total and a batch depends on nothing but the order of the batches
            total[name] = math.fsum([total[name], *batch[name].double().tolist()])
        total["images"] += len(batch[names[0]])
    return formula(total)


class _Measured(nn.Module):
    """Stands where torchmetrics has its network, and hands on the features that it is given in place of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
