"""DiTFastAttn's greedy plan search (arXiv 2406.08552, Algorithm 1), layer by layer while a generation runs.

At each step but the first, layer i of M takes the first candidate whose loss L(O, O') is below i/M of the threshold,
else full attention.  O is the denoiser's output with full attention at this layer and all later ones, O' with the
candidate at this layer; the layers before carry what was chosen, and the state is that of the compressed run.

Once a candidate is taken its O' is the next layer's O, and no layer before it changes again, so a trial costs the
rest of one call and O costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from difa_fx.errors import CalibrationError
from difa_fx.losses import Loss
from difa_fx.plan import Method
from difa_fx.program import State
from difa_fx.search import Frontier, SearchGraph, main_output
from difa_fx.workers import Workers

CANDIDATES = (Method.CACHED, Method.WINDOW_CFG, Method.WINDOW, Method.FULL_CFG)
"""The paper's, in its order: AST, WA-RS + ASC, WA-RS, ASC."""

Losses = dict[str, float]
"""Method to the loss it was tried with."""


@dataclass(slots=True)
class Greedy:
    """A driver that searches; steps that ``rows`` holds already are replayed.

    Attributes:
        threshold: the paper's delta.
        loss: how outputs are compared.
        workers: who shares the samples.
        decided: called after each site of a searched step with the step, the site, and what was chosen.
        finished: called after each step with the rows and losses so far.
        rows: what was chosen, a row a step.
        losses: what was tried, step by step and site by site.
    """

    threshold: float
    loss: Loss
    workers: Workers
    decided: Callable[[int, int, Method], None]
    finished: Callable[[list[tuple[Method, ...]], list[list[Losses]]], None]
    rows: list[tuple[Method, ...]] = field(default_factory=list)
    losses: list[list[Losses]] = field(default_factory=list)
    _state: State = field(default_factory=dict)

    def step(self, graph: SearchGraph, step: int, calls: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        """Choose what every site does at ``step``, and give the denoiser's outputs under it."""
        frontier = graph.start(calls, self._state)
        if step < len(self.rows):
            frontier = replay(graph, frontier, self.rows[: step + 1])
        else:
            frontier, row, losses = self._search(graph, step, frontier)
            self.rows.append(row)
            self.losses.append(losses)
            self.finished(self.rows, self.losses)
        self._state = frontier.state
        return graph.outputs(frontier)

    def _search(
        self, graph: SearchGraph, step: int, frontier: Frontier
    ) -> tuple[Frontier, tuple[Method, ...], list[Losses]]:
        reference = main_output(graph.complete(frontier)) if step else None
        row: list[Method] = []
        losses: list[Losses] = []
        for number, site in enumerate(graph.sites):
            history = [r[number] for r in self.rows]
            limit = (number + 1) / len(graph.sites) * self.threshold
            tried: Losses = {}
            chosen = Method.FULL
            for method in graph.candidates if reference is not None else ():
                if method in site.refused:
                    continue
                assert reference is not None
                trial = graph.advance(frontier, [*history, method])
                output = main_output(graph.complete(trial))
                tried[method.value] = self._measure(reference, output, f"step {step}, {site.path}, {method}")
                if tried[method.value] < limit:
                    frontier, reference, chosen = trial, output, method
                    break
                del trial, output
            if chosen is Method.FULL:
                frontier = graph.advance(frontier, [*history, Method.FULL])
            row.append(chosen)
            losses.append(tried)
            self.decided(step, number, chosen)
        return frontier, tuple(row), losses

    def _measure(self, reference: Tensor, output: Tensor, where: str) -> float:
        return finite(self.workers.mean(self.loss(reference, output)), where)


def finite(value: Tensor, where: str) -> float:
    """``value`` as a number.

    Raises:
        CalibrationError: it is NaN or infinite.
    """
    number = float(value)
    if not torch.isfinite(value).all():
        raise CalibrationError(
            "a loss is not a finite number",
            where=where,
            got=number,
            allowed="a finite loss",
            todo="look for NaN or infinity in the denoiser's output under full attention: weights, dtype, latents",
        )
    return number


def replay(graph: SearchGraph, frontier: Frontier, rows: Sequence[Sequence[Method]]) -> Frontier:
    """One step of decided ``rows``, those of the steps before included: from the first site to the end."""
    for number in range(len(graph.sites)):
        frontier = graph.advance(frontier, [row[number] for row in rows])
    return frontier


def least_and_most_calls(steps: int, layers: int, candidates: int) -> tuple[float, float]:
    """How many calls of the denoiser a search is worth: at least, and at most.

    The first step is one call.  A later one is a call for O, and then for layer i of M each candidate tried costs
    (M - i + 1) / M; where none is taken, 1 / M more.
    """
    least = most = 1.0
    for layer in range(1, layers + 1):
        trial = (layers - layer + 1) / layers
        least += trial
        most += candidates * trial + 1 / layers
    return 1 + (steps - 1) * least, 1 + (steps - 1) * most
