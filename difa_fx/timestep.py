"""The timestep of a call, on its way from a CUDA device to the host while the call itself has begun."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from difa_fx.clock import Grid, exact
from difa_fx.passes.inputs import DenoiserInputs


def grid_of(dtype: torch.dtype | None) -> Grid:
    """Numbers as a timestep of ``dtype`` has them; None and integers: as they are."""
    if dtype is None or not dtype.is_floating_point:
        return exact
    eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).tiny

    def grid(value: float) -> tuple[float, float]:
        rounded = float(torch.tensor(value, dtype=torch.float64).to(dtype))
        return rounded, eps * 2.0 ** math.floor(math.log2(max(abs(value), smallest)))

    return grid


Reading = Callable[[], float | None]
"""Waits for a timestep and gives it; None where the graph has none."""


class TimestepReader:
    """Reads the timestep of one call after the other.

    A plain read would wait until the device has done all that was asked of it, and leave it idle until the next
    launch.  This one waits for what was asked before the read began, and for no more.
    """

    def __init__(self, inputs: DenoiserInputs) -> None:
        self._inputs = inputs
        self._place: Tensor | None = None
        self._there: Any = None

    def begin(self, args: Sequence[Any]) -> Reading:
        """Begin to read; the result is to be called before the next read begins."""
        position = self._inputs.timestep
        value = None if position is None else args[position]
        if not isinstance(value, Tensor) or not value.is_cuda:
            return lambda: self._inputs.time(args)
        if self._place is None:
            with torch.inference_mode(False):
                self._place = torch.empty(1, dtype=value.dtype, pin_memory=True)
            self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._place.copy_(value.reshape(-1)[-1:], non_blocking=True)
        self._there.record()
        return self._read

    def _read(self) -> float:
        assert self._place is not None
        self._there.synchronize()
        return float(self._place)
