"""What Dynamo did for a contender: graphs, breaks, and frames that it gave up on."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(slots=True)
class Heard:
    """Counts; complete once the ``with`` block of :func:`listening` has ended."""

    graphs: int = 0
    graph_breaks: int = 0
    gave_up: int = 0


class _Limits(logging.Handler):
    """Counts Dynamo's warnings that a frame was compiled too often."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "recompile_limit" in record.getMessage()


@contextlib.contextmanager
def listening() -> Iterator[Heard]:
    """Within, what Dynamo compiles is counted."""
    heard, limits, logger = Heard(), _Limits(), logging.getLogger("torch._dynamo")
    before = _counts()
    logger.addHandler(limits)
    try:
        yield heard
    finally:
        logger.removeHandler(limits)
        after = _counts()
        heard.graphs, heard.graph_breaks = after[0] - before[0], after[1] - before[1]
        heard.gave_up = limits.count


def _counts() -> tuple[int, int]:
    counters: Any = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@contextlib.contextmanager
def room(contenders: int) -> Iterator[int]:
    """Within, so many contenders more may compile one denoiser's code before Dynamo stops to; gives the usual limit."""
    config: Any = torch.compiler.config
    usual: int = config.recompile_limit
    with config.patch(recompile_limit=usual + contenders):
        yield usual


def apart(limit: int) -> dict[str, Any]:
    """Keywords of ``torch.compile`` with which a contender's compilations are counted by themselves, up to ``limit``.

    torch has them from 2.13 on; before, contenders share what :func:`room` gives.
    """
    known = inspect.signature(torch.compile).parameters
    wanted = {"isolate_recompiles": True, "recompile_limit": limit}
    return wanted if wanted.keys() <= known.keys() else {}
