"""Real images to compare with, chosen once and for all: N of an ImageNet folder, or N of COCO 2014 with captions.

Both write ``00000.png`` and so on, all of one size, and ``images.json`` with what was chosen.  A choice depends on the
source and the seed alone.  Called again after a kill, they write the images that are missing.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from difa_fx.errors import EvaluationError, OptionError
from difa_fx.evaluation.generate import image_paths
from difa_fx.evaluation.images import THREADS, Folder, cropped, is_image, save_png
from difa_fx.evaluation.records import open_folder, read_json
from difa_fx.plan_io import write_text

#: The captions of :func:`prepare_coco`, one a line, beside its images.
CAPTIONS = "captions.txt"


def prepare_imagenet(
    source: Folder, folder: Folder, *, count: int, size: int, seed: int = 0, progress: bool = True
) -> Path:
    """Choose ``count`` images of a folder and all folders in it, each as likely as any other.

    ``images.json`` lists the chosen ones as ``sources``, paths relative to ``source``.

    Args:
        source: for instance ImageNet's ``train`` or ``val``, with or without a folder a class.
        folder: where the images go.
        count: how many.
        size: pixels a side; each image is scaled to cover the square and cut to its middle.
        seed: another one chooses others.
        progress: show a bar.

    Returns:
        The folder.

    Raises:
        EvaluationError: the source holds too few images, one cannot be read, or the folder was made otherwise.
        OptionError: a number makes no sense.
        PlanFileError: a file cannot be written.
    """
    _check(count, size)
    root = Path(source)
    names = _images_below(root)
    chosen = [names[i] for i in _chosen(len(names), count, seed, str(source))]
    settings = {"made by": "prepare_imagenet", "count": count, "size": size, "seed": seed, "sources": chosen}
    open_folder(Path(folder), settings)
    _write([root / name for name in chosen], Path(folder), size, progress=progress)
    return Path(folder)


def prepare_coco(
    captions: Folder, images: Folder, folder: Folder, *, count: int, size: int, seed: int = 0, progress: bool = True
) -> Path:
    """Choose ``count`` captioned images of COCO and one caption of each.

    ``images.json`` lists the files as ``sources`` and the captions as ``samples``; ``captions.txt`` holds the captions,
    one a line, ready for ``difa calibrate --samples-file`` and ``difa evaluate --prompts``.

    Args:
        captions: ``captions_val2014.json`` of COCO's annotations, or another file of that form.
        images: the folder of the images that it names, such as ``val2014``.
        folder: where the images go.
        count: how many.
        size: pixels a side; each image is scaled to cover the square and cut to its middle.
        seed: another one chooses others.
        progress: show a bar.

    Returns:
        The folder.

    Raises:
        EvaluationError: the captions are not of that form, images are missing or too few, or the folder was made
            otherwise.
        OptionError: a number makes no sense.
        PlanFileError: a file cannot be written.
    """
    _check(count, size)
    pairs = _captioned(Path(captions))
    draw = random.Random(seed)
    chosen = [pairs[i] for i in _chosen(len(pairs), count, seed, str(captions))]
    texts = [draw.choice(list(said)) for _, said in chosen]
    paths = [Path(images) / name for name, _ in chosen]
    _check_there(paths, images)
    settings = {"made by": "prepare_coco", "count": count, "size": size, "seed": seed}
    open_folder(Path(folder), settings | {"sources": [name for name, _ in chosen], "samples": texts})
    write_text(Path(folder) / CAPTIONS, "".join(f"{text}\n" for text in texts))
    _write(paths, Path(folder), size, progress=progress)
    return Path(folder)


def _images_below(root: Path) -> list[str]:
    """Every image in and below ``root`` as a relative path, sorted, so that a choice does not depend on the disk."""

    def refuse(error: OSError) -> None:
        raise EvaluationError(
            f"the folder of images cannot be read: {error.strerror}", where=str(error.filename), todo="check the path"
        ) from error

    found = []
    for place, _, files in os.walk(root, onerror=refuse):
        inside = Path(place).relative_to(root)
        found += [(inside / name).as_posix() for name in files if is_image(name)]
    return sorted(found)


def _captioned(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Each captioned image's file name and its captions, by the numbers that COCO gave images and captions."""
    content = read_json(path)
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        said: dict[Any, list[tuple[Any, str]]] = {}
        for note in content["annotations"]:
            # Some captions of COCO end in, or hold, a line end.
            said.setdefault(note["image_id"], []).append((note["id"], " ".join(note["caption"].split())))
        pairs = [(names[key], tuple(text for _, text in sorted(said[key]))) for key in sorted(said)]
    except (TypeError, KeyError, AttributeError) as error:
        raise EvaluationError(
            "the captions are not in COCO's form",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            allowed='{"images": [{"id", "file_name"}, ...], "annotations": [{"id", "image_id", "caption"}, ...]}',
            todo="give captions_val2014.json of COCO's annotations_trainval2014",
        ) from error
    strange = [name for name, _ in pairs if not isinstance(name, str) or Path(name).name != name]
    if strange:
        raise EvaluationError(
            "the captions name a file that is no plain file name",
            where=str(path),
            got=strange[:3],
            todo="mend the file",
        )
    return pairs


def _chosen(available: int, count: int, seed: int, where: str) -> list[int]:
    """``count`` numbers below ``available``, none twice."""
    if count > available:
        raise EvaluationError(
            "there are fewer images than are to be chosen",
            where=where,
            got=f"{available} images",
            allowed=f"{count} or more",
            todo="choose fewer, or check the path",
        )
    return random.Random(seed).sample(range(available), count)


def _check_there(paths: Sequence[Path], folder: Folder) -> None:
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise EvaluationError(
            "images that the captions name are not there",
            where=str(folder),
            got=f"{len(missing)} of {len(paths)}, such as {', '.join(missing[:3])}",
            todo="unpack all of the images, or check the path",
        )


def _write(sources: Sequence[Path], folder: Path, size: int, *, progress: bool) -> None:
    """Write the images that are not there yet."""
    targets = dict(zip(image_paths(folder, len(sources)), sources, strict=True))
    missing = {target: source for target, source in targets.items() if not target.exists()}

    def write(pair: tuple[Path, Path]) -> None:
        target, source = pair
        save_png(target, cropped(source, size))

    with ThreadPoolExecutor(THREADS) as pool:
        done = pool.map(write, missing.items())
        show: Mapping[str, Any] = {"total": len(targets), "initial": len(targets) - len(missing), "unit": "image"}
        for _ in tqdm(done, desc="prepare", disable=not progress, **show):
            pass


def _check(count: object, size: object) -> None:
    for name, value in (("count", count), ("size", size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} is no whole number from 1 up", where=name, got=value, todo="give 1 or more")
