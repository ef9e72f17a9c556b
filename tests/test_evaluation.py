"""Metrics against torchmetrics called directly, what is left out and why, and going on after a stop."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from evaluation_target import (
    COUNT,
    SIZE,
    Features,
    FeaturesAndLogits,
    Logits,
    distance,
    evaluate,
    folder_of,
    letters,
    three_folders,
)
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from difa_fx.errors import EvaluationError, MetricUnavailableError
from difa_fx.evaluation import Evaluation
from difa_fx.evaluation.images import list_images, read_images
from difa_fx.evaluation.scores import METRICS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return three_folders(tmp_path_factory.mktemp("folders"))


def everything(folders: dict[str, Path], **options) -> Evaluation:
    own = {"features": FeaturesAndLogits(), "clip": letters, "perceptual": distance}
    others = {name: folders[name] for name in ("real", "uncompressed")}
    prompts = [f"{i} cats" for i in range(COUNT)]
    return evaluate(folders["images"], prompts=prompts, **others, **own | options)


def pixels(folder: Path) -> Tensor:
    return read_images([file.path for file in list_images(folder, what="a test")])


def in_batches(folder: Path) -> tuple[Tensor, ...]:
    return pixels(folder).split(8)


# The numbers


def test_fid_is_that_of_torchmetrics(folders):
    metric = FrechetInceptionDistance(Features(), input_img_size=(3, SIZE, SIZE))
    for is_real, name in ((True, "real"), (False, "images")):
        for batch in in_batches(folders[name]):
            metric.update(batch, real=is_real)
    found = evaluate(folders["images"], real=folders["real"], features=Features(), metrics=["fid"])
    assert found.fid == metric.compute().item()
    assert found.fid > 1e-3
    assert (found.images, found.real_images) == (COUNT, 19)


@pytest.mark.parametrize("seed", [0, 5])
def test_inception_score_is_that_of_torchmetrics_under_the_same_seed(folders, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = InceptionScore(Logits())
    for batch in in_batches(folders["images"]):
        metric.update(batch)
    torch.manual_seed(seed)
    mean, std = metric.compute()
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    found = evaluate(folders["images"], features=FeaturesAndLogits(), metrics=["inception_score"], seed=seed)
    assert (found.inception_score, found.inception_score_std) == (mean.item(), std.item())
    assert found.inception_score > 1.001
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's generator is as it was


def test_half_precision_is_of_the_network_alone(folders):
    class Half(Features):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).bfloat16()

    options = {"real": folders["real"], "metrics": ["fid"]}
    half, single = (evaluate(folders["images"], features=network, **options).fid for network in (Half(), Features()))
    assert half == pytest.approx(single, rel=0.01)
    assert torch.tensor(half).bfloat16().item() != half  # the result is not rounded to it


def test_features_alone_serve_as_logits(folders):
    options = {"metrics": ["inception_score"]}
    alone = evaluate(folders["images"], features=Logits(), **options)
    assert alone == evaluate(folders["images"], features=FeaturesAndLogits(), **options)


def test_distances_are_those_of_torchmetrics(folders):
    images, reference = (pixels(folders[name]).float() / 255 for name in ("images", "uncompressed"))
    found = evaluate(folders["images"], uncompressed=folders["uncompressed"], perceptual=distance)
    assert found.psnr == pytest.approx(peak_signal_noise_ratio(images, reference, data_range=1.0).item(), rel=1e-6)
    similarity = structural_similarity_index_measure(images, reference, data_range=1.0).item()
    assert found.ssim == pytest.approx(similarity, rel=1e-5)
    difference = (images - reference).double().abs().sum() / reference.double().sum()
    assert found.relative_l1 == pytest.approx(difference.item(), rel=1e-6)
    assert found.lpips == pytest.approx(distance(images, reference).double().mean().item(), rel=1e-6)
    assert 0 < found.relative_l1 < 0.1
    assert 0.9 < found.ssim < 1


def test_clip_score_is_a_mean_and_never_below_0(folders):
    prompts = [f"{i} cats" for i in range(COUNT)]
    expected = letters(pixels(folders["images"]), prompts).double().mean().item()
    assert evaluate(folders["images"], prompts=prompts, clip=letters).clip_score == pytest.approx(expected, rel=1e-6)
    below = evaluate(folders["images"], prompts=prompts, clip=lambda images, texts: -letters(images, texts))
    assert below.clip_score == 0


def test_a_score_may_be_a_mean_of_the_batch(folders):
    prompts = ["a cat"] * COUNT
    rows, means = (
        evaluate(folders["images"], prompts=prompts, clip=score).clip_score
        for score in (letters, lambda images, texts: letters(images, texts).mean())
    )
    assert means == pytest.approx(rows, rel=1e-6)


def test_the_batch_size_makes_no_difference(folders):
    first, second = (everything(folders, batch_size=size).as_dict() for size in (8, 5))
    for name in METRICS:
        assert first[name] == pytest.approx(second[name], rel=1e-4), name


def test_equal_images(folders):
    found = evaluate(folders["real"], uncompressed=folders["real"], perceptual=distance)
    assert found.psnr == math.inf
    assert (found.lpips, found.relative_l1) == (0, 0)
    assert found.ssim == pytest.approx(1, abs=1e-6)
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["psnr"] == "inf"


def test_black_uncompressed_images(tmp_path):
    black, grey = (folder_of(tmp_path / str(shift), 2, shift=shift) for shift in (-255, -250))
    assert evaluate(grey, uncompressed=black).relative_l1 == math.inf
    assert evaluate(black, uncompressed=black).relative_l1 == 0


# What is left out


def test_everything_that_the_inputs_allow(folders):
    found = everything(folders)
    assert not found.skipped
    assert all(getattr(found, name) is not None for name in METRICS)


def test_what_the_inputs_lack_is_named(folders, tmp_path):
    found = evaluate(folder_of(tmp_path / "few", 2))
    assert {name for name in METRICS if getattr(found, name) is None} == set(found.skipped) == set(METRICS)
    assert "real" in found.skipped["fid"]
    assert "2 images" in found.skipped["inception_score"]
    assert "prompts" in found.skipped["clip_score"]
    assert "uncompressed" in found.skipped["psnr"]
    with pytest.raises(EvaluationError, match="fid cannot be computed: real was not given"):
        evaluate(folders["images"], metrics=["psnr", "fid"], uncompressed=folders["uncompressed"])
    one = folder_of(tmp_path / "one", 1)
    assert "2 images or more" in evaluate(one, real=folders["real"], features=Features()).skipped["fid"]


@pytest.fixture
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither torch-fidelity nor torchvision, wherever the tests run."""
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    monkeypatch.setattr("torchmetrics.image.inception._TORCH_FIDELITY_AVAILABLE", False)
    monkeypatch.setattr("torchmetrics.image.lpip._TORCHVISION_AVAILABLE", False)


@pytest.mark.usefixtures("_bare")
@pytest.mark.parametrize(
    ("metric", "needs"),
    [("fid", "torch-fidelity"), ("inception_score", "torch-fidelity"), ("lpips", "torchvision")],
)
def test_a_network_that_is_missing_is_named_with_the_way_to_get_it(metric, needs, tmp_path):
    images = folder_of(tmp_path / "images", 20, size=32)
    options = {"real": images, "uncompressed": images}
    found = evaluate(images, **options)
    assert getattr(found, metric) is None
    assert f"pip install {needs}" in found.skipped[metric]
    assert found.psnr == math.inf
    with pytest.raises(MetricUnavailableError, match=f"(?s)cannot be had.*pip install {needs}.*your own"):
        evaluate(images, metrics=[metric], **options)


def test_a_clip_model_that_is_missing(folders, tmp_path):
    empty = tmp_path / "clip"
    empty.mkdir()
    prompts = ["a cat"] * COUNT
    assert (
        str(empty) in evaluate(folders["images"], prompts=prompts, clip=str(empty), metrics=None).skipped["clip_score"]
    )
    with pytest.raises(MetricUnavailableError, match="clip="):
        evaluate(folders["images"], prompts=prompts, clip=str(empty), metrics=["clip_score"])


def test_images_too_small_for_a_metric(tmp_path):
    images = folder_of(tmp_path / "images", 2, size=5)
    found = evaluate(images, uncompressed=images)
    assert "5x5" in found.skipped["ssim"]
    assert "5x5" in found.skipped["lpips"]
    assert found.psnr == math.inf


# Going on


class Stop(Exception):  # noqa: N818
    """Stands for a kill."""


class Stopping(FeaturesAndLogits):
    """Is stopped at a call."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.calls == self.at:
            raise Stop
        return super().forward(images)


@pytest.mark.parametrize("at", range(6))
def test_stopped_anywhere_it_goes_on_to_the_same_numbers(at, folders, tmp_path):
    whole = everything(folders)
    with pytest.raises(Stop):
        everything(folders, features=Stopping(at), checkpoint=tmp_path)
    network = Stopping(99)
    assert everything(folders, features=network, checkpoint=tmp_path) == whole
    assert network.calls == 6 - at  # batches of 23 and of 19 images, 8 a batch
    assert everything(folders, features=Stopping(0), checkpoint=tmp_path) == whole
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".safetensors"]


def test_real_images_are_measured_once_for_many_evaluations(folders, tmp_path):
    options = {"real": folders["real"], "metrics": ["fid"], "checkpoint": tmp_path}
    evaluate(folders["images"], features=Features(), **options)
    network = Features()
    evaluate(folders["uncompressed"], features=network, **options)
    assert network.calls == 3  # the images of this folder alone


def test_another_network_or_another_image_is_measured_anew(folders, tmp_path):
    images = folder_of(tmp_path / "images", 20)
    options = {"real": folders["real"], "metrics": ["fid"], "checkpoint": tmp_path / "kept"}
    first = evaluate(images, features=Features(), **options)
    assert evaluate(images, features=Features(seed=1), **options).fid != first.fid
    (images / "00019.png").write_bytes((folders["real"] / "00000.png").read_bytes())
    network = Features()
    assert evaluate(images, features=network, **options).fid != first.fid
    assert network.calls == 1  # the batch of that image alone


def test_functions_without_weights_are_told_apart_by_what_they_do(folders, tmp_path):
    options = {"uncompressed": folders["uncompressed"], "metrics": ["lpips"], "checkpoint": tmp_path}
    once, twice = (
        evaluate(folders["images"], perceptual=lambda a, b, k=k: k * distance(a, b), **options).lpips for k in (1, 2)
    )
    assert twice == pytest.approx(2 * once)


def test_a_kept_file_that_is_broken(folders, tmp_path):
    options = {"uncompressed": folders["uncompressed"], "metrics": ["psnr"], "checkpoint": tmp_path}
    evaluate(folders["images"], **options)
    broken = next(tmp_path.rglob("*.safetensors"))
    broken.write_bytes(broken.read_bytes()[:-3])
    with pytest.raises(EvaluationError, match=f"(?s){broken.name}.*take the file away"):
        evaluate(folders["images"], **options)


def test_a_checkpoint_that_is_a_file(folders, tmp_path):
    (tmp_path / "kept").write_text("")
    with pytest.raises(EvaluationError, match="checkpoint"):
        evaluate(folders["images"], checkpoint=tmp_path / "kept")
