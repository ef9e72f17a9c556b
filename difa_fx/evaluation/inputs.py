"""What is judged: the images of folders, each with its partner and its prompt, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from difa_fx.errors import EvaluationError
from difa_fx.evaluation.images import Folder, ImageFile, list_images
from difa_fx.evaluation.records import NAME, read_record


@dataclass(frozen=True, slots=True)
class Item:
    """An image with what it is compared to.

    Attributes:
        image: the image.
        uncompressed: the one of the same name that was made without compression, or None.
        prompt: what it was made from, or None.
    """

    image: ImageFile
    uncompressed: ImageFile | None = None
    prompt: str | None = None


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that is read.

    Attributes:
        items: the images that are judged.
        real: real images, or None.
        has_pairs: whether the items have uncompressed partners.
        has_prompts: whether they have prompts.
    """

    items: tuple[Item, ...]
    real: tuple[Item, ...] | None
    has_pairs: bool
    has_prompts: bool


def read_inputs(
    folder: Folder, *, real: Folder | None, prompts: Sequence[str] | None, uncompressed: Folder | None
) -> Inputs:
    """List the folders and see that they fit together.

    Raises:
        EvaluationError: a folder is missing, empty or half made, an image has no partner, or the prompts do not fit.
    """
    images, record = _complete(folder, "images to judge")
    partners: Sequence[ImageFile | None] = [None] * len(images)
    if uncompressed is not None:
        partners = _partners(images, record, folder, uncompressed)
    texts = _prompts(images, record, prompts)
    said: Sequence[str | None] = texts or [None] * len(images)
    items = tuple(Item(*fields) for fields in zip(images, partners, said, strict=True))
    originals = None if real is None else tuple(Item(file) for file in _complete(real, "real images")[0])
    return Inputs(items, originals, uncompressed is not None, texts is not None)


def _complete(folder: Folder, what: str) -> tuple[tuple[ImageFile, ...], Mapping[str, Any]]:
    """A folder's images and its record, empty where there is none."""
    images = list_images(folder, what=what)
    record = read_record(folder) or {}
    if record and record["count"] != len(images):
        raise EvaluationError(
            f"the folder of {what} is not complete, or holds others too",
            where=str(folder),
            got=f"{len(images)} images",
            allowed=f"{record['count']}, as its {NAME} says",
            todo="make the missing ones with the call or command that began it, or take foreign ones away",
        )
    return images, record


def _partners(
    images: Sequence[ImageFile], record: Mapping[str, Any], folder: Folder, uncompressed: Folder
) -> list[ImageFile | None]:
    """The uncompressed image of each image's name."""
    others, other_record = _complete(uncompressed, "uncompressed images")
    by_name = {file.path.name: file for file in others}
    alone = [file.path.name for file in images if file.path.name not in by_name]
    if alone:
        raise EvaluationError(
            "images have no uncompressed partner of their name",
            where=str(uncompressed),
            got=f"{len(alone)} of {len(images)}, such as {', '.join(alone[:3])}",
            allowed="one of the same file name for each",
            todo="generate both folders from the same samples and seed",
        )
    for name in ("seed", "samples"):
        first, second = record.get(name), other_record.get(name)
        second = second[: len(images)] if isinstance(second, list) else second
        if first is not None and second is not None and first != second:
            raise EvaluationError(
                f"the images and their uncompressed partners were made from another {name}",
                where=f"{folder}, {uncompressed}",
                allowed=f"the same {name}, so that partners differ by the compression alone",
                todo="generate both folders from the same samples and seed",
            )
    return [by_name[file.path.name] for file in images]


def _prompts(images: Sequence[ImageFile], record: Mapping[str, Any], prompts: Sequence[str] | None) -> list[str] | None:
    """The prompt of each image: those given, or the record's samples where they are texts."""
    if prompts is None:
        samples = record.get("samples")
        texts = isinstance(samples, list) and all(isinstance(text, str) for text in samples)
        return list(samples) if texts and samples else None
    found = list(prompts) if not isinstance(prompts, str) else [prompts]
    if len(found) != len(images) or not all(isinstance(text, str) for text in found):
        raise EvaluationError(
            "the prompts do not fit the images",
            where="prompts",
            got=f"{len(found)} prompts, {len(images)} images",
            allowed="one text an image, in the order of the file names",
            todo="give the samples that the images were made from",
        )
    return found
