"""Real images and captions: which are chosen, what is written, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from difa_fx.cli import main
from difa_fx.errors import EvaluationError, OptionError
from difa_fx.evaluation import prepare_coco, prepare_imagenet


def picture(path: Path, height: int, width: int, value: int) -> None:
    """A grey JPEG or PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of four images of several forms; image k is of the grey 10 k."""
    root = tmp_path_factory.mktemp("imagenet")
    for k in range(12):
        picture(root / f"n{k // 4:08d}" / f"it's {k}.JPEG", 20 + k, 40 - k, 10 * k)
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Captions of six images, two each, and the images."""
    place = tmp_path_factory.mktemp("coco")
    images = [{"id": 100 - k, "file_name": f"COCO_val2014_{100 - k:012d}.jpg"} for k in range(6)]
    notes = [
        {"id": 2 * k + j, "image_id": 100 - k, "caption": f"A picture\nof {100 - k}, {'ab'[j]}. "}
        for k in range(6)
        for j in range(2)
    ]
    for image in images:
        picture(place / "val2014" / image["file_name"], 24, 32, image["id"])
    captions = place / "captions_val2014.json"
    captions.write_text(json.dumps({"info": {}, "images": images, "annotations": notes}))
    return captions, place / "val2014"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def record(folder: Path) -> dict:
    return json.loads((folder / "images.json").read_text())


def test_imagenet_images_are_of_one_size_and_listed(imagenet, tmp_path):
    folder = prepare_imagenet(imagenet, tmp_path / "real", count=5, size=16, progress=False)
    sources = record(folder)["sources"]
    assert len(set(sources)) == 5
    for i, source in enumerate(sources):
        image = Image.open(folder / f"{i:05d}.png")
        assert (image.size, image.mode) == ((16, 16), "RGB")
        grey = 10 * int(Path(source).stem.removeprefix("it's "))
        assert np.abs(np.array(image).astype(int) - grey).max() <= 2  # JPEG's rounding
    assert len(list(folder.glob("*.png"))) == 5


def test_a_choice_is_of_the_seed_and_spread_over_all(imagenet, tmp_path):
    def chosen(name: str, seed: int) -> list[str]:
        folder = prepare_imagenet(imagenet, tmp_path / name, count=6, size=4, seed=seed, progress=False)
        return record(folder)["sources"]

    assert chosen("a", 0) == chosen("b", 0) != chosen("c", 1)
    found = {source for seed in range(8) for source in chosen(f"many{seed}", seed)}
    assert len(found) == 12


def test_a_choice_does_not_depend_on_the_order_on_disk(imagenet, tmp_path, monkeypatch):
    first = prepare_imagenet(imagenet, tmp_path / "a", count=6, size=4, progress=False)
    listed = [(place, folders, files[::-1]) for place, folders, files in os.walk(imagenet)][::-1]
    monkeypatch.setattr(os, "walk", lambda *_, **__: iter(listed))
    second = prepare_imagenet(imagenet, tmp_path / "b", count=6, size=4, progress=False)
    assert contents(first) == contents(second)


def test_images_are_cut_to_their_middle(tmp_path):
    halves = np.zeros((8, 24, 3), dtype=np.uint8)
    halves[:, 8:16] = 200  # the middle square of three
    Image.fromarray(halves).save(tmp_path / "three.png")
    folder = prepare_imagenet(tmp_path, tmp_path / "real", count=1, size=8, progress=False)
    assert np.array(Image.open(folder / "00000.png")).min() == 200


def test_preparing_goes_on_where_it_was(imagenet, tmp_path):
    folder = tmp_path / "real"
    prepare_imagenet(imagenet, folder, count=6, size=8, progress=False)
    whole = contents(folder)
    kept = (folder / "00000.png").stat().st_ino
    for name in ("00002.png", "00005.png"):
        (folder / name).unlink()
    prepare_imagenet(imagenet, folder, count=6, size=8, progress=False)
    assert contents(folder) == whole
    assert (folder / "00000.png").stat().st_ino == kept
    with pytest.raises(EvaluationError, match=r"(?s)other settings.*size: 8 there, 9 now"):
        prepare_imagenet(imagenet, folder, count=6, size=9, progress=False)


def test_coco_captions_belong_to_their_images(coco, tmp_path):
    folder = prepare_coco(*coco, tmp_path / "real", count=5, size=8, progress=False)
    found = record(folder)
    assert len(set(found["sources"])) == 5
    for i, (source, text) in enumerate(zip(found["sources"], found["samples"], strict=True)):
        number = int(Path(source).stem.removeprefix("COCO_val2014_"))
        assert text in (f"A picture of {number}, a.", f"A picture of {number}, b.")
        assert abs(int(np.array(Image.open(folder / f"{i:05d}.png"))[0, 0, 0]) - number) <= 2
    assert (folder / "captions.txt").read_text().splitlines() == found["samples"]


def test_coco_draws_among_an_images_captions(coco, tmp_path):
    ends = set()
    for seed in range(6):
        folder = prepare_coco(*coco, tmp_path / str(seed), count=2, size=4, seed=seed, progress=False)
        ends |= {text[-2] for text in record(folder)["samples"]}
    assert ends == {"a", "b"}


def test_too_few_images(imagenet, coco, tmp_path):
    with pytest.raises(EvaluationError, match="12 images"):
        prepare_imagenet(imagenet, tmp_path / "a", count=13, size=8, progress=False)
    with pytest.raises(EvaluationError, match="6 images"):
        prepare_coco(*coco, tmp_path / "a", count=7, size=8, progress=False)
    with pytest.raises(EvaluationError, match="cannot be read"):
        prepare_imagenet(tmp_path / "none", tmp_path / "a", count=1, size=8, progress=False)
    assert not (tmp_path / "a").exists()


def test_coco_images_that_are_missing(coco, tmp_path):
    with pytest.raises(EvaluationError, match=r"(?s)not there.*3 of 3"):
        prepare_coco(coco[0], tmp_path, tmp_path / "a", count=3, size=8, progress=False)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"images": [], "annotations": [{"id": 1}]}',
        '{"images": [{"id": 1}], "annotations": []}',
        '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"id": 1, "image_id": 1, "caption": null}]}',
        '{"images": [{"id": 1, "file_name": "../a"}], "annotations": [{"id": 1, "image_id": 1, "caption": "x"}]}',
        '{"images": [{"id": 1, "file_name": 3}], "annotations": [{"id": 1, "image_id": 1, "caption": "x"}]}',
    ],
)
def test_captions_of_another_form(content, tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(EvaluationError, match=r"captions\.json"):
        prepare_coco(path, tmp_path, tmp_path / "a", count=1, size=8, progress=False)


def test_a_broken_source_image(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(EvaluationError, match=r"(?s)cannot be read.*a\.jpg"):
        prepare_imagenet(tmp_path, tmp_path / "real", count=1, size=8, progress=False)


@pytest.mark.parametrize("options", [{"count": 0, "size": 8}, {"count": 1, "size": 0}, {"count": True, "size": 8}])
def test_numbers_that_make_no_sense(options, imagenet, tmp_path):
    with pytest.raises(OptionError):
        prepare_imagenet(imagenet, tmp_path / "a", progress=False, **options)


def test_the_command_line(imagenet, coco, tmp_path, capsys):
    options = ["--count", "3", "--size", "8", "--seed", "2"]
    assert main(["prepare", "imagenet", str(imagenet), "-o", str(tmp_path / "a"), *options]) == 0
    assert main(["prepare", "coco", *map(str, coco), "-o", str(tmp_path / "b"), *options]) == 0
    text = capsys.readouterr().out
    assert "a: 3 images" in text
    assert "captions.txt" in text
    expected = prepare_imagenet(imagenet, tmp_path / "c", count=3, size=8, seed=2, progress=False)
    assert contents(tmp_path / "a") == contents(expected)
    assert main(["prepare", "imagenet", str(tmp_path / "none"), "-o", str(tmp_path / "d"), *options]) == 1
    assert "EvaluationError" in capsys.readouterr().err
