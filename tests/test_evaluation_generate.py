"""Folders of generated images: their seeds and batches, what is there already, and what is refused."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_target import draw, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import difa_fx
from difa_fx.errors import DifaError, EvaluationError, OptionError
from difa_fx.evaluation import generate_images


class Recorder:
    """``draw``, and what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[list, list[int]]] = []

    def __call__(self, samples: list, seeds: list[int]) -> Tensor:
        self.calls.append((samples, seeds))
        return draw(samples, seeds)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def make(folder: Path, generate=draw, samples=(3, 1, 4, 1, 5), **options) -> Path:
    return generate_images(generate, list(samples), folder, **{"batch_size": 2, "progress": False} | options)


def test_an_image_depends_on_its_sample_its_number_and_the_seed(tmp_path):
    folder = make(tmp_path / "a", seed=3)
    for i, sample in enumerate([3, 1, 4, 1, 5]):
        pixels = torch.from_numpy(np.array(Image.open(folder / f"{i:05d}.png"))).permute(2, 0, 1)
        assert torch.equal(pixels, noise(7 * sample + 3 * 100_003 + i))


def test_the_record_says_how_they_were_made(tmp_path):
    folder = make(tmp_path / "a", samples=["a bus", "a cat"], generate=lambda s, k: draw([0] * len(s), k))
    record = json.loads((folder / "images.json").read_text())
    assert record["format"] == "difa.images"
    assert (record["count"], record["seed"], record["batch_size"]) == (2, 0, 2)
    assert record["samples"] == ["a bus", "a cat"]
    assert len(record["fingerprint"]) == 64


def test_batches_are_of_one_size_and_the_last_one_repeats_its_own(tmp_path):
    recorder = Recorder()
    make(tmp_path / "a", recorder, samples=[3, 1, 4, 1, 5], batch_size=4)
    assert recorder.calls == [([3, 1, 4, 1], [0, 1, 2, 3]), ([5, 5, 5, 5], [4, 4, 4, 4])]
    assert len(list((tmp_path / "a").glob("*.png"))) == 5


def test_images_that_are_there_are_not_made_again(tmp_path):
    folder = make(tmp_path / "a")
    recorder = Recorder()
    make(folder, recorder)
    assert not recorder.calls


@settings(max_examples=15, deadline=None)
@given(gone=st.sets(st.integers(0, 6)))
def test_whatever_is_missing_is_made_as_before_and_in_the_same_batches(gone):
    with tempfile.TemporaryDirectory() as place:
        folder = make(Path(place) / "a", samples=range(7), batch_size=3)
        whole = contents(folder)
        kept = {path: path.stat().st_ino for path in folder.glob("*.png") if int(path.stem) not in gone}
        for i in gone:
            (folder / f"{i:05d}.png").unlink()
        recorder = Recorder()
        make(folder, recorder, samples=range(7), batch_size=3)
        assert contents(folder) == whole
        assert {path: path.stat().st_ino for path in kept} == kept
        assert [samples for samples, _ in recorder.calls] == [
            batch for batch in ([0, 1, 2], [3, 4, 5], [6, 6, 6]) if gone & set(batch)
        ]


def test_drafts_of_a_killed_run_are_taken_away(tmp_path):
    folder = make(tmp_path / "a")
    whole = contents(folder)
    (folder / ".00004.png.ab12.tmp").write_bytes(b"half")
    make(folder)
    assert contents(folder) == whole


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("seed", {"seed": 1}),
        ("samples", {"samples": [3, 1, 4, 1, 6]}),
        ("count", {"samples": [3, 1, 4, 1]}),
        ("batch_size", {"batch_size": 3}),
        ("settings", {"settings": {"plan": "b"}}),
    ],
)
def test_a_folder_of_other_settings_is_refused(name, options, tmp_path):
    folder = make(tmp_path / "a", settings={"plan": "a"})
    whole = contents(folder)
    with pytest.raises(EvaluationError, match=f"(?s)other settings.*{name}: .*another folder"):
        make(folder, **{"settings": {"plan": "a"}} | options)
    assert contents(folder) == whole


def test_a_folder_of_unknown_images_is_refused(tmp_path):
    folder = make(tmp_path / "a")
    (folder / "images.json").unlink()
    with pytest.raises(EvaluationError, match="nothing is known"):
        make(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"format": "difa.images", "version": 2}', b"\x80\x04"])
def test_a_broken_record_is_refused(content, tmp_path):
    folder = make(tmp_path / "a")
    (folder / "images.json").write_bytes(content)
    with pytest.raises(EvaluationError, match=r"images\.json"):
        make(folder)


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda n: torch.zeros(n + 1, 3, 8, 8), r"shape \[3, 3, 8, 8\]"),
        (lambda n: torch.zeros(n, 3, 8), r"shape \[2, 3, 8\]"),
        (lambda n: torch.zeros(n, 4, 8, 8), r"shape \[2, 4, 8, 8\]"),
        (lambda n: torch.zeros(n, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (lambda n: torch.full((n, 3, 8, 8), torch.nan), "NaN"),
        (lambda n: torch.full((n, 3, 8, 8), -1.0), "-1"),
        (lambda n: torch.full((n, 3, 8, 8), 255.0), "255"),
        (lambda n: [torch.zeros(3, 8, 8)] * n, "list"),
    ],
)
def test_what_is_no_batch_of_images_is_refused_and_nothing_is_written(output, got, tmp_path):
    with pytest.raises(EvaluationError, match=f"(?s)images 0 to 1.*{got}"):
        make(tmp_path / "a", lambda samples, seeds: output(len(samples)))
    assert not list((tmp_path / "a").glob("*.png"))


def test_rounding_beyond_the_range_is_cut_and_grey_images_are_written(tmp_path):
    folder = make(tmp_path / "a", lambda s, k: torch.full((len(s), 1, 8, 8), 1 + 1e-6, dtype=torch.float16))
    assert np.array(Image.open(folder / "00000.png")).tolist() == [[255] * 8] * 8


@pytest.mark.parametrize("options", [{"samples": []}, {"batch_size": 0}, {"batch_size": True}, {"seed": -1}])
def test_settings_that_make_no_sense(options, tmp_path):
    with pytest.raises(OptionError):
        make(tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(DifaError, match="cannot be made"):
        make(tmp_path / "a")


def test_names_are_in_order_beyond_five_digits(tmp_path):
    from difa_fx.evaluation.generate import image_paths

    names = [path.name for path in image_paths(tmp_path, 100_001)]
    assert names == sorted(names)
    assert names[0] == "000000.png"


def test_it_is_part_of_the_package():
    assert difa_fx.generate_images is generate_images
