"""A folder of generated images: made in whole batches, gone on with after a kill, shared by processes.

Shape letters: B images, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from difa_fx.errors import EvaluationError, OptionError
from difa_fx.evaluation.images import Folder, write_png
from difa_fx.evaluation.processes import wait_for_all, workers_here
from difa_fx.evaluation.records import open_folder

#: ``(samples, seeds)`` of one batch to its images, [B, 1 or 3, H, W] in [0, 1].
Generate: TypeAlias = Callable[[list[Any], list[int]], Tensor]

#: Pixels this far outside [0, 1] are rounding.
_SLACK = 1e-3


def generate_images(
    generate: Generate,
    samples: Sequence[Any],
    folder: Folder,
    *,
    batch_size: int = 8,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Make one image a sample: ``00000.png`` and so on, and ``images.json``, which says how they were made.

    Image i gets the seed ``seed * 100_003 + i``, so runs can be compared image by image.  Every batch has
    ``batch_size`` samples, the last one filled up by repeating its own, and batch b always holds the same ones:
    ``generate`` sees one shape, and what was there before changes nothing.  Called again after a kill, it makes the
    images that are missing.  Where a process group is set up, as under ``torchrun``, process r of n makes every n-th
    batch from the r-th on.

    ``generate`` itself cannot be recognised.  Say in ``settings`` what else the images depend on (the model, the plan,
    the steps): a folder made with other settings is then refused and not mixed with new images.

    Args:
        generate: ``(samples, seeds)`` of a batch to images ``[B, C, H, W]`` in [0, 1], C = 1 or 3.
        samples: prompts, class labels or whatever ``generate`` takes.
        folder: made if it is not there.
        batch_size: samples a call of ``generate``.
        seed: first half of the images' seeds.
        settings: JSON values that go into the record and are compared.
        progress: show a bar.

    Returns:
        The folder.

    Raises:
        EvaluationError: the folder was made with other settings, or ``generate`` returned something else than images.
        OptionError: there is no sample, or a setting is wrong.
        PlanFileError: a file cannot be written.
    """
    samples, folder = list(samples), Path(folder)
    _check(samples, batch_size, seed)
    workers = workers_here()
    if workers.leads:
        made = {"made by": "generate_images", "count": len(samples), "seed": seed, "batch_size": batch_size}
        open_folder(folder, made | {"settings": dict(settings or {}), "samples": samples})
    wait_for_all(workers)
    paths = image_paths(folder, len(samples))
    starts = range(0, len(samples), batch_size)[workers.rank :: workers.size]
    for start in tqdm(starts, desc="generate", unit="batch", disable=not (progress and workers.leads)):
        chosen = range(start, min(start + batch_size, len(samples)))
        missing = [i for i in chosen if not paths[i].exists()]
        if missing:
            images_BCHW = _batch(generate, samples, chosen, batch_size, seed)
            for i in missing:
                write_png(paths[i], images_BCHW[i - start])
    wait_for_all(workers)
    return folder


def image_paths(folder: Path, count: int) -> list[Path]:
    """The files of ``count`` images, whose order by name is their order by number."""
    digits = max(5, len(str(count - 1)))
    return [folder / f"{i:0{digits}d}.png" for i in range(count)]


def _batch(generate: Generate, samples: list[Any], chosen: range, size: int, seed: int) -> Tensor:
    """One batch, [B, C, H, W] uint8 on the CPU; rows behind those of ``chosen`` are filling."""
    filled = [chosen[k % len(chosen)] for k in range(size)]
    with torch.no_grad():
        images: object = generate([samples[i] for i in filled], [seed * 100_003 + i for i in filled])
    where = f"images {chosen[0]} to {chosen[-1]}"
    if not isinstance(images, Tensor):
        raise _not_images(where, type(images).__name__, size)
    if images.ndim != 4 or len(images) != size or images.shape[1] not in (1, 3):
        raise _not_images(where, f"a tensor of shape {list(images.shape)}", size)
    if not images.is_floating_point():
        raise _not_images(where, str(images.dtype), size)
    images = images.detach().float().cpu()
    if not bool(images.isfinite().all()):
        raise _not_images(where, "NaN or infinity", size)
    low, high = images.min().item(), images.max().item()
    if low < -_SLACK or high > 1 + _SLACK:
        raise _not_images(where, f"values from {low:.3g} to {high:.3g}", size)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def _not_images(where: str, got: str, size: int) -> EvaluationError:
    return EvaluationError(
        "generate returned something else than a batch of images",
        where=where,
        got=got,
        allowed=f"a floating-point tensor [{size}, 1 or 3, H, W] of finite values in [0, 1]",
        todo='return what a pipeline gives with output_type="pt", for all samples of the batch',
    )


def _check(samples: list[Any], batch_size: object, seed: object) -> None:
    if not samples:
        raise OptionError("there is no sample", where="samples", todo="give one sample an image")
    numbers: tuple[tuple[str, object, int], ...] = (("batch_size", batch_size, 1), ("seed", seed, 0))
    for name, value, least in numbers:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(
                f"{name} is no whole number from {least} up", where=name, got=value, todo=f"give {least} or more"
            )
