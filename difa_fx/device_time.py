"""How long work takes: as a whole, or on a CUDA device what kernels take without what it takes to launch them."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, Final

import torch

_ROUNDS: Final = 9
_TIMES: Final = 10
"""Runs in one measurement: together they take longer than what comes before and after."""


def timed(work: Callable[[], object], cuda: bool) -> float:
    """Seconds that ``work`` takes, its kernels included."""
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def recorded(run: Callable[[], object], *, times: int = 1) -> Callable[[], object]:
    """``run``, so many times, as a CUDA graph: its replay takes what the device takes, and no launches.

    Where it cannot be one, it is run as it is, with a warning.
    """

    def repeated() -> None:
        for _ in range(times):
            run()

    run()  # compiles
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # The outer block brings this stream back where the recording ends in an error.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            repeated()
    except RuntimeError as error:
        warnings.warn(f"timed without a CUDA graph, launches included: {error}", stacklevel=2)
        return repeated
    return graph.replay


def seconds_of(run: Callable[[], object]) -> float:
    """Median seconds that ``run`` takes on the current CUDA device."""
    replay = recorded(run, times=_TIMES)
    replay()
    found = []
    for _ in range(_ROUNDS):
        start, end = (_event(), _event())
        start.record()
        replay()
        end.record()
        end.synchronize()
        found.append(float(start.elapsed_time(end)) / 1000 / _TIMES)
    return statistics.median(found)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
