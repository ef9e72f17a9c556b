"""Rows on disk: one file a batch and measure, named by a digest of all that its numbers depend on.

A file is written whole or not at all, and found again by whoever asks for the same batch: the same evaluation after a
kill, the other processes, or the next evaluation against the same real images.  A few KB an image are kept, less than
the image itself takes.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from difa_fx.errors import EvaluationError
from difa_fx.evaluation.images import Folder
from difa_fx.evaluation.inputs import Item
from difa_fx.evaluation.measures import Measure
from difa_fx.evaluation.processes import wait_for_all
from difa_fx.plan_io import write_bytes
from difa_fx.workers import Workers

#: Changes when rows come to mean something else.
VERSION = 1


@dataclass(frozen=True, slots=True)
class Shards:
    """The rows that were measured so far.

    Attributes:
        folder: where the files are.
    """

    folder: Path

    def path(self, measure: Measure, items: Sequence[Item]) -> Path:
        """The file for a batch, whether it is there or not."""
        reads: list[object] = [[str(item.image.path), item.image.stamp] for item in items]
        if measure.pairs:
            reads += [[str(item.uncompressed.path), item.uncompressed.stamp] for item in items if item.uncompressed]
        if measure.texts:
            reads += [item.prompt for item in items]
        digest = hashlib.sha256(json.dumps([VERSION, measure.identity, reads]).encode()).hexdigest()
        return self.folder / measure.name / f"{digest[:32]}.safetensors"

    def keep(self, path: Path, rows: dict[str, Tensor]) -> None:
        """Write a batch's rows.

        Raises:
            PlanFileError: the file cannot be written, for instance on a full disk.
        """
        from safetensors.torch import save

        path.parent.mkdir(parents=True, exist_ok=True)
        # safetensors refuses tensors that share memory
        apart = {name: row.cpu().clone(memory_format=torch.contiguous_format) for name, row in rows.items()}
        write_bytes(path, save(apart))

    def read(self, path: Path) -> dict[str, Tensor]:
        """A batch's rows.

        Raises:
            EvaluationError: the file is gone or broken.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise EvaluationError(
                "what was measured of a batch cannot be read",
                where=str(path),
                got=str(error),
                todo="take the file away and evaluate again; several machines must share one checkpoint folder",
            ) from error


@contextmanager
def open_shards(checkpoint: Folder | None, workers: Workers) -> Iterator[Shards]:
    """The rows kept in ``checkpoint``, or in a temporary folder that all processes share.

    Raises:
        EvaluationError: the folder cannot be made, or this process does not see it.
    """
    _check_safetensors()
    if checkpoint is not None:
        folder = Path(checkpoint).resolve()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(
                f"the checkpoint folder cannot be made: {error.strerror}",
                where=str(checkpoint),
                todo="name a folder, not a file, in a place that can be written",
            ) from error
        yield Shards(folder)
        return
    with tempfile.TemporaryDirectory(prefix="difa-evaluate-") as own:
        shared = Path(workers.same(own))
        if not shared.is_dir():
            raise EvaluationError(
                "this process does not see the temporary folder of the first one",
                where=str(shared),
                todo="give checkpoint=, a folder that all machines share",
            )
        yield Shards(shared)
        wait_for_all(workers)  # before the first process takes its folder away


def _check_safetensors() -> None:
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        raise EvaluationError(
            "measurements are kept by safetensors, which is not installed", todo="pip install safetensors"
        ) from None


def batches(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Items in batches of ``size``, the last one of what is left: the same ones for any number of processes."""
    return [items[start : start + size] for start in range(0, len(items), size)]
