"""Image files: those of a folder in order, their pixels as tensors, and PNGs that are whole or not there.

Shape letters: B images, C channels, H and W pixels.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from difa_fx.errors import EvaluationError
from difa_fx.plan_io import write_bytes

Folder: TypeAlias = str | os.PathLike[str]

SUFFIXES = (".png", ".jpg", ".jpeg")

#: Files decoded at once; Pillow lets go of the interpreter's lock while it decodes.
THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image on disk.

    Attributes:
        path: where it is, absolute.
        stamp: bytes, time of the last change in ns, and inode; another stamp means other content.
    """

    path: Path
    stamp: tuple[int, int, int]


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image; drafts of files being written are not."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def list_images(folder: Folder, *, what: str) -> tuple[ImageFile, ...]:
    """The images that lie in ``folder`` itself, by name.

    Args:
        folder: where they are.
        what: which folder this is, for messages.

    Raises:
        EvaluationError: there is no such folder, or no image in it.
    """
    place = Path(folder).resolve()
    try:
        with os.scandir(place) as entries:
            names = sorted(entry.name for entry in entries if is_image(entry.name))
        files = tuple(ImageFile(place / name, _stamp(place / name)) for name in names)
    except OSError as error:
        raise EvaluationError(
            f"the folder of {what} cannot be read: {error.strerror}", where=str(folder), todo="check the path"
        ) from error
    if not files:
        raise EvaluationError(
            f"the folder of {what} holds no image",
            where=str(folder),
            allowed=f"files that end in {', '.join(SUFFIXES)}, in the folder itself",
            todo="check the path",
        )
    return files


def read_images(paths: Sequence[Path]) -> Tensor:
    """The pixels of images of one size, [B, 3, H, W] uint8; grey ones have three equal channels.

    Raises:
        EvaluationError: an image cannot be read, or one has another size than the first.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        images = list(pool.map(_pixels, paths))
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise EvaluationError(
                "images that are judged together differ in size",
                where=str(path),
                got=f"{image.shape[1]}x{image.shape[2]} pixels, and {paths[0].name} has "
                f"{images[0].shape[1]}x{images[0].shape[2]}",
                allowed="one size in a folder",
                todo="bring them to one size; `difa prepare` does it for real images",
            )
    return torch.stack(images)


def size_of(path: Path) -> tuple[int, int]:
    """Height and width in pixels.

    Raises:
        EvaluationError: it cannot be read.
    """
    return tuple(_pixels(path).shape[1:])  # type: ignore[return-value]


def write_png(path: Path, image_CHW: Tensor) -> None:
    """Write an image, [1 or 3, H, W] uint8, whole or not at all.

    Raises:
        PlanFileError: it cannot be written, for instance on a full disk.
    """
    array = image_CHW.permute(1, 2, 0).contiguous().cpu().numpy()
    save_png(path, _pillow().fromarray(array[..., 0] if array.shape[2] == 1 else array))


def save_png(path: Path, image: Any) -> None:
    """Write an image of Pillow as PNG, whole or not at all."""
    content = io.BytesIO()
    image.save(content, format="PNG")
    write_bytes(path, content.getvalue())


def cropped(path: Path, size: int) -> Any:
    """The image at ``path`` as RGB, scaled to cover ``size`` x ``size`` pixels (bicubic) and cut to its middle.

    Raises:
        EvaluationError: it cannot be read.
    """
    from PIL import ImageOps

    return ImageOps.fit(_opened(path), (size, size), method=_pillow().Resampling.BICUBIC)


def _stamp(path: Path) -> tuple[int, int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns, about.st_ino


def _pixels(path: Path) -> Tensor:
    """[3, H, W] uint8."""
    return torch.from_numpy(np.array(_opened(path))).permute(2, 0, 1)


def _opened(path: Path) -> Any:
    """The whole image in memory, as RGB, turned as its EXIF says.

    Raises:
        EvaluationError: it cannot be read, or 8 bits a channel do not hold what it has.
    """
    pillow = _pillow()
    from PIL import ImageOps

    try:
        with pillow.open(path) as image:
            image.load()
            return _in_8_bits(path, ImageOps.exif_transpose(image))
    # SyntaxError and ValueError: what Pillow's PNG reader raises on a broken file
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise EvaluationError(
            "an image cannot be read", where=str(path), got=str(error), todo="replace the file, or take it away"
        ) from error


def _in_8_bits(path: Path, image: Any) -> Any:
    """``image`` as RGB; 16 bits of grey are scaled, and alpha is dropped where all is opaque."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return _pillow().fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise EvaluationError(
            "the values of an image have no known range",
            where=str(path),
            got=f"mode {image.mode}: 32 bits a pixel",
            allowed="8 bits a channel, or 16 bits of grey",
            todo="save it with 8 bits a channel",
        )
    if "A" in image.getbands() or "transparency" in image.info:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema()[0] < 255:
            raise EvaluationError(
                "an image is transparent, and what lies behind it is not known",
                where=str(path),
                got=f"mode {image.mode} with alpha from {alpha.getextrema()[0]}",
                allowed="opaque images",
                todo="lay it on a background, and save it without alpha",
            )
    return image.convert("RGB")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise EvaluationError(
            "images are read and written by Pillow, which is not installed", todo="pip install pillow"
        ) from None
    return Image
