"""Several processes that calibrate together: each has its share of the samples, all decide alike.

Works under ``torchrun``; alone, every function does nothing.  The processes only exchange a few numbers a trial.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from difa_fx.errors import CalibrationError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Workers:
    """The processes of one calibration.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
        weight: samples of this process, as a share of all.
    """

    rank: int = 0
    size: int = 1
    weight: float = 1.0

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all samples of what each process found for its own; equal on all processes."""
        if self.size == 1:
            return values
        total = values.detach().double().cpu() * self.weight
        parts = [torch.empty_like(total) for _ in range(self.size)]
        _all_gather(parts, total)
        return torch.stack(parts).sum(0)

    def same(self, value: T) -> T:
        """What the first process has, on all of them."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=_wire())
        return box[0]  # type: ignore[no-any-return]


def share_samples(samples: Sequence[T]) -> tuple[Workers, list[tuple[int, T]]]:
    """The processes, and this one's samples with their numbers among all.

    Raises:
        CalibrationError: there are fewer samples than processes.
    """
    numbered = list(enumerate(samples))
    if not (dist.is_available() and dist.is_initialized()):
        return Workers(), numbered
    rank, size = dist.get_rank(), dist.get_world_size()
    if len(numbered) < size:
        raise CalibrationError(
            "there are fewer samples than processes",
            where="calibrate",
            got=f"{len(numbered)} samples, {size} processes",
            allowed=f"{size} samples or more",
            todo="give more samples, or start fewer processes",
        )
    own = numbered[rank::size]
    return Workers(rank, size, len(own) / len(numbered)), own


@contextmanager
def launched_by_torchrun() -> Iterator[bool]:
    """Join the processes that ``torchrun`` started, for as long as the block lasts; alone, nothing happens.

    Gives whether this process leads.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ or dist.is_initialized():
        yield True
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def _all_gather(parts: list[Tensor], total: Tensor) -> None:
    """Gathered, not reduced: the sum is then taken in one order everywhere."""
    wire = _wire()
    if wire.type == "cpu":
        dist.all_gather(parts, total)
        return
    moved = [part.to(wire) for part in parts]
    dist.all_gather(moved, total.to(wire))
    for part, value in zip(parts, moved, strict=True):
        part.copy_(value)


def _wire() -> torch.device:
    """Where the tensors that are exchanged must lie."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
