"""Images as people have them: 16 bits, alpha, turned by EXIF; read right, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from difa_fx.errors import EvaluationError
from difa_fx.evaluation.images import read_images
from difa_fx.evaluation.records import read_record


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (24, 16), dtype=np.uint8)


def test_16_bits_of_grey_are_the_same_picture(tmp_path: Path) -> None:
    grey = picture()
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    first, second = read_images([tmp_path / "8.png", tmp_path / "16.png"])
    assert (first == second).all()


def test_exif_turns_an_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(picture()).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.rot90(picture(), -1)).save(tmp_path / "plain.png")
    first, second = read_images([tmp_path / "turned.png", tmp_path / "plain.png"])
    assert (first == second).all()


@pytest.mark.parametrize("alpha", [255, 254])
def test_alpha_is_dropped_where_all_is_opaque_and_refused_elsewhere(tmp_path: Path, alpha: int) -> None:
    rgba = np.dstack([*[picture()] * 3, np.full((24, 16), 255, dtype=np.uint8)])
    rgba[3, 3, 3] = alpha
    Image.fromarray(rgba).save(tmp_path / "image.png")
    if alpha == 255:
        assert (read_images([tmp_path / "image.png"])[0, 0].numpy() == picture()).all()
        return
    with pytest.raises(EvaluationError, match="transparent"):
        read_images([tmp_path / "image.png"])


@pytest.mark.parametrize("samples", [["a"], 3, ["a", "b", "c"]])
def test_a_record_with_other_than_one_sample_an_image_is_refused(tmp_path: Path, samples: object) -> None:
    record = {"format": "difa.images", "version": 1, "fingerprint": "x", "count": 2, "samples": samples}
    (tmp_path / "images.json").write_text(json.dumps(record))
    with pytest.raises(EvaluationError, match="one sample for each image"):
        read_record(tmp_path)
