"""The bundled denoiser: a small, real DiT that draws scikit-learn's handwritten digits.

The data are the 1797 scans of ``sklearn.datasets.load_digits`` (8x8 pixels, 17 grey levels), enlarged
smoothly to 32x32. The denoiser is a diffusers ``DiTTransformer2DModel`` that looks at every pixel on its
own (patch size 1, hence 1024 tokens), so attention is the main part of its work, as it is in the large
models. It is sampled by diffusers' own ``DiTPipeline`` with classifier-free guidance, conditional half first.
A classifier fitted to the real scans then reads what was drawn: one number that says whether a sampler,
or a compressed denoiser, still works.

    pipe = load_pipeline()
    labels = [3, 1, 4, 1, 5]
    images = generate(pipe, labels, seed=0)
    print(fit_classifier().accuracy(images, labels))

Every image tensor that this module takes or returns is ``[B, 1, 32, 32]``, float32, black -1 to white 1.
``DiTPipeline`` itself returns [0, 1]; ``generate`` maps that back.

Shape letters: B images, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    ConfigMixin,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor

FOLDER = Path(__file__).with_name("digits")
"""The committed weights, their two configs, and ``training.json``, the record of how they were made."""

SIZE = 32
SCAN_SIZE = 8
CLASSES = 10
NULL_CLASS = 1000
"""The label of "no class"; ``DiTPipeline`` knows no other."""

STEPS = 20
GUIDANCE_SCALE = 3.0
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digits(NamedTuple):
    """Real digits: ``images`` [B, 1, 32, 32] in [-1, 1] and ``labels`` [B], int64."""

    images: Tensor
    labels: Tensor


class PixelVAE(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' bases are untyped
    """The autoencoder that ``DiTPipeline`` asks for, where the latents are the pixels: it changes nothing."""

    @register_to_config
    def __init__(self, scaling_factor: float = 1.0) -> None:
        super().__init__()
        # Diffusers reads a module's dtype and device off its tensors, and this one has no weights.
        self.register_buffer("anchor", torch.zeros(1), persistent=False)

    def decode(self, latents_B1HW: Tensor) -> DecoderOutput:
        """Return the latents as the image."""
        return DecoderOutput(sample=latents_B1HW)


@dataclass(frozen=True, slots=True)
class Classifier:
    """Reads digits off images; ``held_out_accuracy`` is its score on real scans that it was not fitted to."""

    svc: SVC
    held_out_accuracy: float

    def predict(self, images_B1HW: Tensor) -> Tensor:
        """Return the digit seen in each image, [B] int64."""
        return torch.from_numpy(self.svc.predict(_features(images_B1HW)))

    def accuracy(self, images_B1HW: Tensor, labels: Sequence[int] | Tensor) -> float:
        """Return the share of images that are read as the digit that was asked for."""
        wanted_B = torch.as_tensor(labels).cpu()
        if len(wanted_B) != len(images_B1HW):
            raise ValueError(f"{len(images_B1HW)} images came with {len(wanted_B)} labels")
        return (self.predict(images_B1HW) == wanted_B).double().mean().item()


def digit_images() -> Digits:
    """Load the real scans, enlarged to 32x32 with a bicubic filter; nothing is downloaded."""
    scans = load_digits()
    scans_B1HW = torch.from_numpy(scans.images).float()[:, None] / 8 - 1
    images_B1HW = F.interpolate(scans_B1HW, size=(SIZE, SIZE), mode="bicubic").clamp(-1, 1)
    return Digits(images_B1HW, torch.from_numpy(scans.target).long())


@cache
def fit_classifier() -> Classifier:
    """Fit a support vector machine to three quarters of the real scans and score it on the rest."""
    images, labels = digit_images()
    fit_x, held_x, fit_y, held_y = train_test_split(
        _features(images), labels.numpy(), test_size=0.25, random_state=0, stratify=labels.numpy()
    )
    svc = SVC(C=10).fit(fit_x, fit_y)
    return Classifier(svc, float(svc.score(held_x, held_y)))


def frechet_distance(images_B1HW: Tensor, reference_B1HW: Tensor) -> float:
    """Return the Frechet distance of two sets of images, in the classifier's 64 features.

    It is FID's formula: of the Gaussians fitted to both sets, the squared distance of the means plus
    ``tr(S + R - 2 (S R)^(1/2))`` of the covariances. Like FID it grows when images are few, so only
    sets of one size can be compared.
    """
    images, reference = _gaussian(images_B1HW), _gaussian(reference_B1HW)
    # With S = P^T P and R = Q^T Q, the roots of the eigenvalues of S R are the singular values of P Q^T.
    shared = np.linalg.svd(images.root @ reference.root.T, compute_uv=False).sum()
    spread = (images.root**2).sum() + (reference.root**2).sum() - 2 * shared
    return float(((images.mean - reference.mean) ** 2).sum() + max(spread, 0.0))


def distances(images_B1HW: Tensor, reference_B1HW: Tensor) -> dict[str, float]:
    """Return relative L1, PSNR in dB and SSIM of images to those that they should equal."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    images, reference = (images_B1HW + 1) / 2, (reference_B1HW + 1) / 2
    return {
        "relative_l1": float((images - reference).abs().mean() / reference.abs().mean()),
        "psnr": float(peak_signal_noise_ratio(images, reference, data_range=1.0)),
        "ssim": float(structural_similarity_index_measure(images, reference, data_range=1.0)),
    }


def load_pipeline(
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device = "cpu",
    folder: Path = FOLDER,
) -> DiTPipeline:
    """Build the ``DiTPipeline`` around the weights in ``folder``, with its progress bar off.

    The weights are stored in half precision and computed with in ``dtype``.
    """
    pipe = DiTPipeline(
        transformer=DiTTransformer2DModel.from_pretrained(folder, torch_dtype=dtype).eval(),
        vae=PixelVAE(),
        scheduler=DPMSolverMultistepScheduler.from_pretrained(folder),
        id2label=dict(enumerate(NAMES)),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def generate(
    pipe: DiTPipeline,
    labels: Sequence[int] | Tensor,
    *,
    seed: int,
    steps: int = STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    batch_size: int | None = None,
) -> Tensor:
    """Draw one digit per label; return [B, 1, 32, 32] float32 in [-1, 1] on the CPU.

    The noise of image i depends on ``seed`` and i alone, so runs can be compared image by image whatever
    the denoiser, the device or ``batch_size`` (all at once if it is None).
    """
    wanted = [int(label) for label in labels]
    # The CPU generator looks at the lower 32 bits of a seed alone.
    generators = [torch.Generator().manual_seed(seed * 100_003 + i) for i in range(len(wanted))]
    images = [
        pipe(
            wanted[part],
            guidance_scale=guidance_scale,
            generator=generators[part],
            num_inference_steps=steps,
            output_type="pt",
        ).images
        for part in _parts(len(wanted), batch_size)
    ]
    return torch.cat(images).float().cpu() * 2 - 1


def _parts(count: int, size: int | None) -> Iterator[slice]:
    """Cut ``range(count)`` into slices of at most ``size``."""
    size = size or max(count, 1)
    return (slice(start, start + size) for start in range(0, count, size))


class _Gaussian(NamedTuple):
    """A mean, and a root of the covariance: ``root.T @ root`` is the covariance."""

    mean: Any
    root: Any


def _gaussian(images_B1HW: Tensor) -> _Gaussian:
    """Fit a Gaussian to the features of images; QR gives the root without squaring rounding errors."""
    features = _features(images_B1HW)
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 images; there are {len(features)}")
    mean = features.mean(axis=0)
    return _Gaussian(mean, np.linalg.qr(features - mean, mode="r") / np.sqrt(len(features) - 1))


def _features(images_B1HW: Tensor) -> Any:
    """Shrink images back to the scans' 8x8 pixels, one float64 row each: [B, 64]."""
    pooled_B1HW = F.adaptive_avg_pool2d(images_B1HW.detach().float().cpu(), SCAN_SIZE)
    return pooled_B1HW.flatten(1).double().numpy()
