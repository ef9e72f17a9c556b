"""The paper's loss against that of its authors' code on the same outputs, to convert thresholds.

    python benchmarks/losses.py -o benchmarks/results/losses

The greedy search runs on the bundled denoiser and decides by the paper's loss; of every candidate that it tries both
losses are computed. The code leaves out the absolute values in the maximum that divides, so its losses are larger. The
conversion is the median of the ratios of those candidates whose loss lies near their layer's limit, within a factor of
``--near``: these are the ones that a threshold decides about. Writes ``.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from difa_fx import losses
from difa_fx.generation import generation_of
from difa_fx.greedy import CANDIDATES, Greedy
from difa_fx.hardware import hardware
from difa_fx.plan import DEFAULT_WINDOW, Method
from difa_fx.plan_io import write_text
from difa_fx.search import Backend, SearchSettings
from difa_fx.workers import Workers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from digits import GUIDANCE_SCALE, load_pipeline

THRESHOLDS = (0.025, 0.05, 0.075, 0.1, 0.125, 0.15)
"""D1 to D6 of the paper."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate that a search tried.

    Attributes:
        threshold: of the search.
        method: the candidate.
        limit: of its layer.
        paper: the paper's loss.
        reference: the loss of the authors' code.
    """

    threshold: float
    method: str
    limit: float
    paper: float
    reference: float

    @property
    def ratio(self) -> float:
        """The code's loss, as a multiple of the paper's."""
        return self.reference / self.paper


def main(argv: Sequence[str] | None = None) -> list[Trial]:
    """Search, print and write the table; all trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="path of the results, without a suffix")
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS, help="the paper's, to search with")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--window", type=int, default=DEFAULT_WINDOW)
    parser.add_argument("--near", type=float, default=1.5, help="factor within which a loss is near its limit")
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "aot_eager", "eager"))
    options = parser.parse_args(argv)
    trials = [trial for threshold in options.thresholds for trial in _search(threshold, options)]
    text = _table(trials, options)
    print(text)
    if options.output is not None:
        settings = vars(options) | {"output": None}
        record = {"hardware": hardware(), "settings": settings, "trials": [_rounded(trial) for trial in trials]}
        write_text(options.output.with_suffix(".json"), json.dumps(record) + "\n")
        write_text(options.output.with_suffix(".md"), text)
    return trials


def _rounded(trial: Trial) -> list[Any]:
    """Threshold, method, limit, the paper's loss and the code's, to five digits."""
    return [float(f"{value:.5g}") if isinstance(value, float) else value for value in astuple(trial)]


def _search(threshold: float, options: argparse.Namespace) -> list[Trial]:
    """The trials of one search."""
    pairs: list[tuple[float, float]] = []

    def both(output: Tensor, candidate: Tensor) -> Tensor:
        value = losses.paper(output, candidate)
        pairs.append((float(value), float(losses.reference(output, candidate))))
        return value

    with tqdm(total=options.steps, desc=f"threshold {threshold:g}", unit="step", leave=False) as bar:

        def decided(step: int, site: int, method: Method) -> None:
            if site == 0:
                bar.update()

        driver = Greedy(
            threshold=threshold,
            loss=both,
            workers=Workers(),
            decided=decided,
            finished=lambda rows, found: None,
        )
        _generate(driver, options)
    sites = len(driver.losses[0])
    tried = [(method, site) for row in driver.losses for site, found in enumerate(row) for method in found]
    return [
        Trial(threshold, method, (site + 1) / sites * threshold, paper, reference)
        for (method, site), (paper, reference) in zip(tried, pairs, strict=True)
    ]


def _generate(driver: Greedy, options: argparse.Namespace) -> None:
    settings = SearchSettings(window=options.window, cfg="cond_first", compiler=options.compiler)
    backend = Backend(lambda attention, args: (settings, CANDIDATES))
    generation = generation_of(
        load_pipeline(),
        list(enumerate(i % 10 for i in range(options.samples))),
        steps=options.steps,
        seed=0,
        sampler=None,
        kwargs={"guidance_scale": GUIDANCE_SCALE, "output_type": "pt"},
    )
    with generation.compiled(backend):
        generation.run(backend, driver)


def _table(trials: Sequence[Trial], options: argparse.Namespace) -> str:
    """A row for each threshold and method, as Markdown."""
    about = hardware()
    head = (
        f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}; {options.samples} digits, "
        f"{options.steps} steps, window {options.window}. Ratio: the loss of the authors' code, as a multiple of the "
        f"paper's, of the same output. Near the limit: within a factor of {options.near:g} of it."
    )
    lines = [
        head,
        "",
        "| threshold | method | trials | median ratio | 5 % - 95 % | near the limit | median ratio there |",
        "|---|---|---|---|---|---|---|",
    ]
    for threshold in options.thresholds:
        own = [trial for trial in trials if trial.threshold == threshold and trial.paper > 0]
        for method in (None, *Method):
            lines += _row(threshold, method, [t for t in own if method is None or t.method == method.value], options)
    lines.append("")
    for threshold in options.thresholds:
        near = _near([t for t in trials if t.threshold == threshold], options.near)
        if near:
            factor = statistics.median(t.ratio for t in near)
            lines.append(f"The paper's {threshold:g} is about {threshold * factor:.3g} for the authors' code.")
    return "\n".join(lines) + "\n"


def _row(threshold: float, method: Method | None, trials: Sequence[Trial], options: argparse.Namespace) -> list[str]:
    if not trials:
        return []
    ratios, near = [t.ratio for t in trials], _near(trials, options.near)
    there = f"{statistics.median(t.ratio for t in near):.2f}" if near else "-"
    low, high = _quantile(ratios, 0.05), _quantile(ratios, 0.95)
    cells = [f"{threshold:g}", method.value if method else "all", str(len(trials)), f"{statistics.median(ratios):.2f}"]
    return ["| " + " | ".join([*cells, f"{low:.2f} - {high:.2f}", str(len(near)), there]) + " |"]


def _near(trials: Sequence[Trial], factor: float) -> list[Trial]:
    return [trial for trial in trials if trial.limit / factor <= trial.paper <= trial.limit * factor]


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


if __name__ == "__main__":
    main()
