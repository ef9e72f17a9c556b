"""What evaluation refuses: folders, prompts, images and networks that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evaluation_target import COUNT, Features, draw, evaluate, folder_of, letters, three_folders
from torch import nn

from difa_fx.errors import EvaluationError, OptionError
from difa_fx.evaluation import generate_images


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return three_folders(tmp_path_factory.mktemp("folders"))


def test_unknown_metrics_and_settings(folders):
    with pytest.raises(OptionError, match=r"(?s)fdi.*fid"):
        evaluate(folders["images"], metrics=["fdi"])
    with pytest.raises(OptionError, match="metrics"):
        evaluate(folders["images"], metrics="fid")
    with pytest.raises(OptionError, match="batch_size"):
        evaluate(folders["images"], batch_size=0)
    with pytest.raises(OptionError, match="device"):
        evaluate(folders["images"], device="nothing")


def test_folders_that_are_missing_or_empty(folders, tmp_path):
    with pytest.raises(EvaluationError, match="images to judge"):
        evaluate(tmp_path / "none")
    with pytest.raises(EvaluationError, match="holds no image"):
        evaluate(tmp_path)
    with pytest.raises(EvaluationError, match="real images"):
        evaluate(folders["images"], real=tmp_path)


def test_images_without_a_partner(folders):
    with pytest.raises(EvaluationError, match=r"(?s)no uncompressed partner.*4 of 23.*00019\.png"):
        evaluate(folders["images"], uncompressed=folders["real"])


def test_prompts_that_do_not_fit(folders):
    with pytest.raises(EvaluationError, match="2 prompts, 23 images"):
        evaluate(folders["images"], prompts=["a", "b"])


def test_an_unfinished_folder_is_not_judged(tmp_path):
    folder = generate_images(draw, [1, 2, 3], tmp_path / "a", progress=False)
    (folder / "00001.png").unlink()
    with pytest.raises(EvaluationError, match=r"(?s)not complete.*2 images.*3, as its images\.json"):
        evaluate(folder)


def test_other_seeds_are_no_partners(tmp_path):
    first, second = (generate_images(draw, [1, 2], tmp_path / str(s), seed=s, progress=False) for s in (0, 1))
    with pytest.raises(EvaluationError, match="another seed"):
        evaluate(first, uncompressed=second)


def test_prompts_come_from_the_record(tmp_path):
    prompts = ["a cat", "two dogs", "a bus"]
    folder = generate_images(lambda s, seeds: draw([0] * len(s), seeds), prompts, tmp_path / "a", progress=False)
    assert evaluate(folder, clip=letters) == evaluate(folder, clip=letters, prompts=prompts)
    labels = generate_images(draw, [1, 2, 3], tmp_path / "b", progress=False)
    assert "prompts" in evaluate(labels, clip=letters).skipped["clip_score"]


def test_sizes_that_differ(tmp_path):
    images = folder_of(tmp_path / "images", 2)
    larger = folder_of(tmp_path / "larger", 2, size=20)
    with pytest.raises(EvaluationError, match="partners differ in size"):
        evaluate(images, uncompressed=larger)
    (images / "00001.png").write_bytes((larger / "00001.png").read_bytes())
    with pytest.raises(EvaluationError, match=r"(?s)differ in size.*00001\.png.*20x20.*difa prepare"):
        evaluate(images, uncompressed=images)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"no image at all"])
def test_a_broken_image(content, folders, tmp_path):
    images = folder_of(tmp_path / "images", 3)
    (images / "00001.png").write_bytes(content)
    with pytest.raises(EvaluationError, match=r"(?s)cannot be read.*00001\.png"):
        evaluate(images, real=folders["real"], features=Features())


def test_a_truncated_image(folders, tmp_path):
    images = folder_of(tmp_path / "images", 3)
    path = images / "00001.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(EvaluationError, match=r"(?s)cannot be read.*00001\.png"):
        evaluate(images, real=folders["real"], features=Features())


class Says(nn.Module):
    """Gives back what it was made with."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: object) -> object:
        return self.value


@pytest.mark.parametrize(
    "value", [torch.zeros(5), torch.zeros(1, 5), torch.full((2, 5), torch.nan), "text", torch.zeros(2, 5, 1)]
)
def test_a_network_that_gives_no_features(value, folders):
    with pytest.raises(EvaluationError, match="something else than numbers"):
        evaluate(folders["images"], real=folders["real"], features=Says(value))


@pytest.mark.parametrize("value", [torch.zeros(3), torch.tensor(torch.inf), 1.0])
def test_a_distance_that_is_none(value, folders):
    with pytest.raises(EvaluationError, match="something else than numbers"):
        evaluate(folders["images"], uncompressed=folders["uncompressed"], perceptual=Says(value))


def test_a_clip_that_cannot_be_called(folders):
    with pytest.raises(EvaluationError, match="clip cannot be called"):
        evaluate(folders["images"], prompts=["a"] * COUNT, clip=3)


def test_hidden_files_and_others_are_no_images(folders, tmp_path):
    images = folder_of(tmp_path / "images", 3)
    for name in (".00003.png.12ab.tmp", ".00004.png", "notes.txt"):
        (images / name).write_text("no image")
    assert evaluate(images, uncompressed=folders["uncompressed"]).images == 3
