"""The networks that metrics look through: Inception, CLIP and LPIPS's AlexNet, from the libraries that carry them.

Their weights are downloaded by those libraries at first use.  What cannot be had is an error that says what is missing
and where it comes from; the caller decides whether the metric is left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from difa_fx.errors import MetricUnavailableError

#: The CLIP that DiTFastAttn's evaluation asks.
CLIP = "openai/clip-vit-base-patch16"

_INCEPTION = (
    "pip install torch-fidelity (it brings torchvision); without a network, put "
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth into "
    "$TORCH_HOME/hub/checkpoints; or give a network of your own: features=..."
)
_CLIP = "give the folder of a CLIP model that transformers can load, or anything (images, prompts) -> scores: clip=..."
_LPIPS = (
    "pip install torchvision; without a network, put https://download.pytorch.org/models/alexnet-owt-7be5be79.pth into "
    "$TORCH_HOME/hub/checkpoints; or give a distance of your own: perceptual=..."
)

#: ``(images, prompts)`` to scores; ``(images, uncompressed images)`` to distances.
PairScore = Callable[[Tensor, Any], Tensor]


def inception_features(device: torch.device) -> nn.Module:
    """[B, 3, H, W] uint8 -> [B, 2048], what FID is made of.

    Raises:
        MetricUnavailableError: torchmetrics, torch-fidelity or the weights are missing.
    """
    with _needed("the Inception network", _INCEPTION):
        from torchmetrics.image.fid import FrechetInceptionDistance

        return FrechetInceptionDistance(feature=2048).inception.to(device)


def inception_logits(device: torch.device) -> nn.Module:
    """[B, 3, H, W] uint8 -> [B, 1008], what Inception Score is made of.

    Raises:
        MetricUnavailableError: torchmetrics, torch-fidelity or the weights are missing.
    """
    with _needed("the Inception network", _INCEPTION), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `InceptionScore` will save all", category=UserWarning)
        from torchmetrics.image.inception import InceptionScore

        return InceptionScore(feature="logits_unbiased").inception.to(device)


def clip_score(name: str, device: torch.device) -> tuple[nn.Module, PairScore]:
    """The CLIPScore of torchmetrics with the CLIP model ``name``, and the function that scores a batch with it.

    Args:
        name: a model of the hub, or a folder.
        device: where it runs.

    Raises:
        MetricUnavailableError: torchmetrics, transformers or the weights are missing.
    """
    with _needed(f"the CLIP model {name}", _CLIP):
        from torchmetrics.multimodal.clip_score import CLIPScore
        from transformers import CLIPConfig, CLIPModel, CLIPProcessor

        # One small file first: without a network, the hub is asked for it alone, and that takes long enough.
        config = CLIPConfig.from_pretrained(name)
        model = CLIPModel.from_pretrained(name, config=config)
        pair: Any = (_Towers(model), CLIPProcessor.from_pretrained(name))
        metric = CLIPScore(model_name_or_path=lambda: pair, sync_on_compute=False).to(device)

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        metric.reset()
        metric.update(images, prompts)
        return metric.score / metric.n_samples

    return metric, score


def lpips(device: torch.device) -> tuple[nn.Module, PairScore]:
    """The LPIPS of torchmetrics through AlexNet, and the function that gives the distances of a batch, [B].

    Raises:
        MetricUnavailableError: torchmetrics, torchvision or the weights are missing.
    """
    with _needed("LPIPS's AlexNet", _LPIPS):
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity(
            net_type="alex", reduction="none", normalize=True, sync_on_compute=False
        ).to(device)

    def score(images: Tensor, reference: Tensor) -> Tensor:
        metric.reset()
        metric.update(images, reference)
        distances: Tensor = metric.compute()
        return distances

    return metric, score


def ssim() -> Callable[[Tensor, Tensor], Tensor]:
    """The mean structural similarity of torchmetrics, of images [B, C, H, W] in [0, 1] and others.

    Raises:
        MetricUnavailableError: torchmetrics is missing.
    """
    check_torchmetrics()
    from torchmetrics.functional.image import structural_similarity_index_measure

    def similarity(images: Tensor, reference: Tensor) -> Tensor:
        found = structural_similarity_index_measure(images, reference, data_range=1.0)
        assert isinstance(found, Tensor)
        return found

    return similarity


def check_torchmetrics() -> None:
    """See that torchmetrics is there, before anything is measured for it.

    Raises:
        MetricUnavailableError: it is not.
    """
    with _needed("torchmetrics", "pip install torchmetrics"):
        import torchmetrics  # noqa: F401


def version() -> str:
    """The version of torchmetrics; its networks and formulas are not the same in all of them."""
    try:
        return metadata.version("torchmetrics")
    except metadata.PackageNotFoundError:
        return "none"


class _Towers(nn.Module):
    """A CLIP model whose features are tensors, as torchmetrics expects; in transformers 5 they come in a record."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def get_image_features(self, *args: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(*args))  # type: ignore[operator]

    def get_text_features(self, *args: Tensor) -> Tensor:
        return _pooled(self.model.get_text_features(*args))  # type: ignore[operator]


def _pooled(features: Any) -> Tensor:
    found = features if isinstance(features, Tensor) else features.pooler_output
    assert isinstance(found, Tensor)
    return found


@contextmanager
def _needed(what: str, todo: str) -> Iterator[None]:
    """What libraries raise when a package, a file or the network is missing, as one error."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        raise MetricUnavailableError(
            f"{what} cannot be had", where="metrics", got=str(error).strip() or type(error).__name__, todo=todo
        ) from error
