"""Measures: what one look at a batch of images leaves behind, as rows of numbers, one an image.

A measure knows nothing of folders, other batches or other processes.  Metrics are sums over its rows (``scores.py``).

Shape letters: B images, H and W pixels, F features, K classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from difa_fx.checkpoint import fingerprint_of, plain
from difa_fx.errors import EvaluationError, MetricUnavailableError
from difa_fx.evaluation import networks

#: Pixels that SSIM's Gaussian of sigma 1.5 reaches to either side; the border is reflected over as many.
_SSIM_REACH = 5
#: AlexNet halves a side three times: (s - 7) / 4 + 1 after its first layer must be 7 at least.
_LPIPS_LEAST = 31


@dataclass(frozen=True, slots=True)
class Batch:
    """What is looked at together.

    Attributes:
        images: [B, 3, H, W] uint8.
        uncompressed: the same of the same seeds without compression, or None.
        prompts: B texts, or None.
    """

    images: Tensor
    uncompressed: Tensor | None = None
    prompts: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Measure:
    """One kind of look.

    Attributes:
        name: which kind.
        identity: digest of all that the rows depend on besides the batch.
        look: a batch to named rows, [B, ...] each.
        pairs: whether it reads the uncompressed images.
        texts: whether it reads the prompts.
    """

    name: str
    identity: str
    look: Callable[[Batch], dict[str, Tensor]]
    pairs: bool = False
    texts: bool = False


def measures_for(
    metric: str, *, features: nn.Module | None, clip: Any, perceptual: Any, device: torch.device, size: tuple[int, int]
) -> Measure:
    """The measure that ``metric`` is made of.

    Args:
        metric: one of ``scores.METRICS``.
        features: the user's network for FID and Inception Score, or None for Inception.
        clip: a name or folder, ``(images, prompts) -> scores``, or None.
        perceptual: ``(images, uncompressed) -> distances``, or None for LPIPS.
        device: where networks run.
        size: height and width of the images.

    Raises:
        MetricUnavailableError: a network cannot be had, or the images are too small for it.
        EvaluationError: a network of the user's gives something else than numbers for each image.
    """
    if metric in ("psnr", "relative_l1"):
        return Measure("pixels", _digest("pixels"), _pixels, pairs=True)
    if metric == "ssim":
        _check_size(size, _SSIM_REACH + 1, "SSIM")
        return _ssim(device)
    if metric in ("fid", "inception_score"):
        return _features(metric, features, device, size)
    if metric == "clip_score":
        return _clip(clip, device, size)
    return _perceptual(perceptual, device, size)


def _features(metric: str, network: nn.Module | None, device: torch.device, size: tuple[int, int]) -> Measure:
    networks.check_torchmetrics()
    if network is not None:
        name, network = "features", network.to(device).eval()
    elif metric == "fid":
        name, network = "inception", networks.inception_features(device)
    else:
        name, network = "logits", networks.inception_logits(device)

    def look(batch: Batch) -> dict[str, Tensor]:
        found = network(batch.images)
        pair = found if isinstance(found, tuple) and len(found) == 2 else (found,)
        named = zip(("features", "logits"), pair, strict=False)
        return {key: _rows(value, len(batch.images), "features", 2) for key, value in named}

    return Measure(name, _identity(name, network, look, device, size), look)


def _clip(clip: Any, device: torch.device, size: tuple[int, int]) -> Measure:
    if clip is None or isinstance(clip, str):
        network, score = networks.clip_score(clip or networks.CLIP, device)
    else:
        network, score = _own(
            clip, "clip", "(images, prompts) -> scores, or the name or folder of a CLIP model", device
        )

    def look(batch: Batch) -> dict[str, Tensor]:
        assert batch.prompts is not None
        return {"clip": _rows(score(batch.images, list(batch.prompts)), len(batch.images), "clip", 1)}

    return Measure("clip", _identity("clip", network, look, device, size), look, texts=True)


def _perceptual(perceptual: Any, device: torch.device, size: tuple[int, int]) -> Measure:
    if perceptual is None:
        _check_size(size, _LPIPS_LEAST, "LPIPS's AlexNet")
        network, score = networks.lpips(device)
    else:
        network, score = _own(perceptual, "perceptual", "(images, uncompressed images) -> distances", device)

    def look(batch: Batch) -> dict[str, Tensor]:
        images, reference = _unit(batch)
        return {"lpips": _rows(score(images, reference), len(images), "perceptual", 1)}

    return Measure("lpips", _identity("lpips", network, look, device, size), look, pairs=True)


def _pixels(batch: Batch) -> dict[str, Tensor]:
    """Sums over each image's values of 0 to 255, in whole numbers: exact in any order."""
    images, reference = (image.int() for image in _pair(batch))
    difference = images - reference
    return {
        "squared": difference.square().flatten(1).sum(1),
        "absolute": difference.abs().flatten(1).sum(1),
        "reference": reference.flatten(1).sum(1),
        "values": torch.full((len(reference),), reference[0].numel()),
    }


def _ssim(device: torch.device) -> Measure:
    similarity = networks.ssim()

    def look(batch: Batch) -> dict[str, Tensor]:
        # One by one: it holds five copies of what it sees, as floats.
        found = [similarity(*_unit(Batch(a[None], b[None]))) for a, b in zip(*_pair(batch), strict=True)]
        return {"ssim": _rows(torch.stack(found), len(found), "ssim", 1)}

    return Measure("ssim", _digest("ssim", networks.version(), device.type), look, pairs=True)


def _unit(batch: Batch) -> tuple[Tensor, Tensor]:
    """Images and uncompressed ones as float32 in [0, 1]."""
    images, uncompressed = _pair(batch)
    return images.float() / 255, uncompressed.float() / 255


def _pair(batch: Batch) -> tuple[Tensor, Tensor]:
    assert batch.uncompressed is not None
    return batch.images, batch.uncompressed


def _own(function: Any, where: str, form: str, device: torch.device) -> tuple[Any, networks.PairScore]:
    if not callable(function):
        raise EvaluationError(
            f"{where} cannot be called", where=where, got=type(function).__name__, allowed=form, todo="give a callable"
        )
    own = function.to(device).eval() if isinstance(function, nn.Module) else function
    return own, own


def _rows(value: Any, count: int, where: str, ndim: int) -> Tensor:
    """``value`` as ``count`` rows of ``ndim`` dimensions; one number for all of a batch of scores is each one's."""
    if isinstance(value, Tensor) and ndim == 1 and value.numel() in (1, count):
        value = value.reshape(-1).expand(count)
    if not isinstance(value, Tensor) or value.ndim != ndim or len(value) != count:
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise _wrong(where, got, f"[{count}, F]" if ndim == 2 else f"[{count}], or one number, their mean")
    if not bool(value.isfinite().all()):
        raise _wrong(where, "NaN or infinity", "finite numbers")
    # What FID and Inception Score are computed in is at least single precision.
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def _wrong(where: str, got: str, allowed: str) -> EvaluationError:
    return EvaluationError(
        "a network gave something else than numbers for each image",
        where=where,
        got=got,
        allowed=allowed,
        todo="see the docstring of difa_fx.evaluate",
    )


def _check_size(size: tuple[int, int], least: int, what: str) -> None:
    if min(size) < least:
        raise MetricUnavailableError(
            f"the images are too small for {what}",
            where="metrics",
            got=f"{size[0]}x{size[1]} pixels",
            allowed=f"{least} pixels a side, or more",
            todo="leave this metric out",
        )


def _identity(
    name: str, network: Any, look: Callable[[Batch], dict[str, Tensor]], device: torch.device, size: tuple[int, int]
) -> str:
    """Digest of a network: of its weights, or, of one that has none, of what it says to two fixed noise images."""
    kind = f"{type(network).__module__}.{type(network).__qualname__}, torchmetrics {networks.version()}"
    if isinstance(network, nn.Module) and any(True for _ in chain(network.parameters(), network.buffers())):
        # In a list, so that nothing but the tensors of a foreign class is looked at.
        return fingerprint_of({"measure": name, "class": kind, "device": device.type}, nn.ModuleList([network]))
    noise = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        rows = look(Batch(noise.to(device), noise.flip(0).to(device), ("a house", "two dogs")))
    return _digest(name, kind, device.type, rows)


def _digest(*parts: str | Mapping[str, Tensor]) -> str:
    text = json.dumps([torch.__version__, *(plain(part) for part in parts)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
