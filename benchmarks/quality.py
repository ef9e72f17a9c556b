"""What calibrated plans do to the time and the quality of the bundled digits: the table and figure in ``results/``.

    python benchmarks/quality.py -o benchmarks/results/quality-cpu-2-cores

writes ``.json``, ``.md``, ``.png``, and the plans into a folder beside them. A row is a plan: one from calibration at
each threshold and for each budget, and the bundled one. It generates every batch twice, with plain Inductor and under
the plan, who take turns in being first; its speed-up is the median of the batches' ratios. ``--pairs`` leaves Inductor
out of the later batches, to save time; distances to its images are then of the first ones.

Rows and searches are written as they come. The same command goes on where it stopped, and one with other thresholds or
budgets adds to the table; ``--fresh`` starts anew.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache
from tqdm import tqdm

import difa_fx
from difa_fx.cost import kept
from difa_fx.hardware import hardware
from difa_fx.plan import DEFAULT_WINDOW, Plan

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import digits
from quality_report import Row, draw, markdown, order

THRESHOLDS = (0.025, 0.05, 0.075, 0.1, 0.125, 0.15)
BUDGETS = (1.25, 1.5, 1.75)
SETTINGS = ("images", "batch", "pairs", "seed", "samples", "calibration_seed", "steps", "window", "compiler")
"""The options that all rows of a table must share."""

Calibrate = Callable[..., Plan]


class Job(NamedTuple):
    """A row to be made: its ``series`` is ``inductor``, ``bundled``, ``threshold`` or ``budget``."""

    name: str
    series: str
    setting: float | None = None


class Measured(NamedTuple):
    """What one plan's batches gave, by kind: ``inductor``, and ``difa`` where there is a plan."""

    images: dict[str, Tensor]
    seconds: dict[str, list[float]]
    compile_seconds: dict[str, float]
    costs: dict[str, Any]


def main(argv: Sequence[str] | None = None, *, calibrate: Calibrate | None = None) -> list[Row]:
    """Measure what is missing, write and print the table, draw the figure; return all rows.

    Args:
        argv: the command's arguments.
        calibrate: called in place of ``difa_fx.calibrate``.
    """
    options = _options(argv)
    record = _open(options)
    jobs = _jobs(options)
    for number, job in enumerate(jobs, 1):
        done = _is_done(job, record, options)
        print(f"[{number}/{len(jobs)}] {job.name}{': there already' if done else ''}", file=sys.stderr)
        if not done:
            plan = _plan(job, record, options, calibrate)
            row = _row(job, plan, record["searches"].get(job.name), options)
            record["rows"] = [other for other in record["rows"] if other["name"] != job.name] + [asdict(row)]
            _keep(record, options)
    rows = sorted((Row(**row) for row in record["rows"]), key=order)
    text = markdown(rows, record, options.output.name)
    _write(_beside(options, ".md"), text)
    draw(rows, _beside(options, ".png"))
    print(text)
    return rows


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="path of the results, without a suffix")
    parser.add_argument("--thresholds", type=float, nargs="*", default=THRESHOLDS)
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS, help="speed-ups to search for")
    parser.add_argument("--bundled", action=argparse.BooleanOptionalAction, default=True, help="a row for its plan")
    parser.add_argument("--images", type=int, default=100, help="digits to judge by, whole batches (default 100)")
    parser.add_argument("--batch", type=int, default=20, help="digits generated at once (default 20)")
    parser.add_argument("--pairs", type=int, help="batches that Inductor generates for each plan too (default all)")
    parser.add_argument("--seed", type=int, default=1, help="noise of the first batch; later ones count up")
    parser.add_argument("--samples", type=int, default=8, help="digits to calibrate on (default 8)")
    parser.add_argument("--calibration-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=digits.STEPS)
    parser.add_argument("--window", type=int, default=DEFAULT_WINDOW)
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument("--fresh", action="store_true", help="start anew")
    options = parser.parse_args(argv)
    options.batch = min(options.batch, options.images)
    if options.batch < 1 or options.images < 2 or options.images % options.batch:
        parser.error(f"--images ({options.images}) must be 2 or more, in whole batches (--batch {options.batch})")
    batches = options.images // options.batch
    options.pairs = batches if options.pairs is None else options.pairs
    if not 1 <= options.pairs <= batches:
        parser.error(f"--pairs ({options.pairs}) must be 1 to the number of batches ({batches})")
    if options.seed <= options.calibration_seed < options.seed + batches:
        parser.error(f"--calibration-seed {options.calibration_seed} is a seed of the digits that are judged")
    return options


def _beside(options: argparse.Namespace, suffix: str) -> Path:
    output: Path = options.output
    return output.with_name(output.name + suffix)


def _jobs(options: argparse.Namespace) -> list[Job]:
    jobs = [Job("Inductor", "inductor")]
    if options.bundled:
        made_by = str(_bundled().provenance.get("made by", ""))
        jobs.append(Job("hand-made" if made_by.startswith("hand") else "bundled", "bundled"))
    jobs += [Job(f"threshold {value:g}", "threshold", value) for value in sorted(set(options.thresholds))]
    return jobs + [Job(f"budget {value:g}x", "budget", value) for value in sorted(set(options.budgets))]


def _bundled() -> Plan:
    return Plan.load(digits.FOLDER / "plan.json")


def _open(options: argparse.Namespace) -> dict[str, Any]:
    """The record of an earlier run, or an empty one; one that was made otherwise is an error."""
    path = _beside(options, ".json")
    settings = {name: getattr(options, name) for name in SETTINGS}
    made = {"version": difa_fx.__version__, "hardware": hardware(), "settings": settings}
    if options.fresh or not path.exists():
        shutil.rmtree(_searches(options), ignore_errors=True)
        options.output.mkdir(parents=True, exist_ok=True)
        return made | {"real_scans_frechet": _sampling_error(options), "searches": {}, "rows": []}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for part, value in made.items():
        if record[part] != value:
            raise SystemExit(f"{path} has another {part}: {record[part]}, not {value}; start anew with --fresh")
    return record


def _sampling_error(options: argparse.Namespace) -> float:
    """The Frechet distance that as many real scans have to all of them."""
    scans = digits.digit_images().images
    chosen = torch.randperm(len(scans), generator=torch.Generator().manual_seed(options.seed))[: options.images]
    return digits.frechet_distance(scans[chosen], scans)


def _keep(record: dict[str, Any], options: argparse.Namespace) -> None:
    _write(_beside(options, ".json"), json.dumps(record, indent=1, allow_nan=False) + "\n")


def _write(path: Path, text: str) -> None:
    """Replace a file in one move."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _searches(options: argparse.Namespace) -> Path:
    """Where calibrations keep what they found."""
    folder: Path = options.output / ".searches"
    return folder


def _plan_path(job: Job, options: argparse.Namespace) -> Path:
    output: Path = options.output
    return output / f"{job.name.replace(' ', '-')}.json"


def _is_done(job: Job, record: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether the record has the row; the bundled plan may have changed since."""
    if job.name not in {row["name"] for row in record["rows"]}:
        return False
    path = _plan_path(job, options)
    return job.series != "bundled" or (path.exists() and Plan.load(path) == _bundled())


def _plan(job: Job, record: dict[str, Any], options: argparse.Namespace, calibrate: Calibrate | None) -> Plan | None:
    """The plan of a row, searched for if it was not yet, and kept in the folder."""
    path = _plan_path(job, options)
    if job.series == "inductor":
        return None
    if job.series == "bundled":
        _bundled().save(path)
    elif job.name not in record["searches"]:
        started = time.perf_counter()
        plan = _search(job, options, calibrate or difa_fx.calibrate)
        record["searches"][job.name] = time.perf_counter() - started
        plan.save(path)
        _keep(record, options)
    return Plan.load(path)


def _search(job: Job, options: argparse.Namespace, calibrate: Calibrate) -> Plan:
    """A calibration; budgets share one profile, and a search that was killed goes on."""
    goal: dict[str, Any] = {"threshold" if job.series == "threshold" else "target_speedup": job.setting}
    with fresh_cache():
        return calibrate(
            digits.load_pipeline(),
            _labels(options.samples),
            num_inference_steps=options.steps,
            window=options.window,
            seed=options.calibration_seed,
            cfg="cond_first",
            compiler=options.compiler,
            progress=True,
            cache_dir=_searches(options),
            pipeline_kwargs={"guidance_scale": digits.GUIDANCE_SCALE, "output_type": "pt"},
            **goal,
        )


def _row(job: Job, plan: Plan | None, search_seconds: float | None, options: argparse.Namespace) -> Row:
    measured = _measure(job.name, plan, options)
    kind = "inductor" if plan is None else "difa"
    images, plain = measured.images[kind], measured.seconds["inductor"]
    seconds = measured.seconds[kind][: len(plain)]
    ratios = [theirs / ours for ours, theirs in zip(seconds, plain, strict=True)]
    reference = measured.images["inductor"]
    apart = digits.distances(images[: len(reference)], reference)
    search = {} if plan is None else plan.provenance.get("calibration") or {}
    return Row(
        **job._asdict(),
        seconds=statistics.median(seconds),
        inductor_seconds=statistics.median(plain),
        speed_up=statistics.median(ratios),
        least_speed_up=min(ratios),
        largest_speed_up=max(ratios),
        pairs=len(ratios),
        compile_seconds=measured.compile_seconds[kind],
        search_seconds=search_seconds,
        accuracy=digits.fit_classifier().accuracy(images, _labels(options.images)),
        frechet=digits.frechet_distance(images, digits.digit_images().images),
        relative_l1=apart["relative_l1"],
        psnr=apart["psnr"] if math.isfinite(apart["psnr"]) else None,
        ssim=apart["ssim"],
        predicted_speed_up=(search.get("predicted") or {}).get("speed_up"),
        calibrated_speed_up=(search.get("measured") or {}).get("speed_up"),
        **measured.costs,
    )


def _labels(count: int) -> list[int]:
    return [i % digits.CLASSES for i in range(count)]


def _measure(title: str, plan: Plan | None, options: argparse.Namespace) -> Measured:
    """Every batch under the plan, and those to be paired with plain Inductor too; each kind is first in turn."""
    torch.compiler.reset()
    pipes: dict[str, Any] = {"inductor": digits.load_pipeline()}
    pipes["inductor"].transformer.compile(backend=options.compiler)
    costs: dict[str, Any] = {"flops_kept": 1.0, "flops_kept_with_projections": 1.0, "state_bytes": 0}
    if plan is not None:
        pipes["difa"] = difa_fx.attach(digits.load_pipeline(), plan, compiler=options.compiler)
    batches = options.images // options.batch
    seconds: dict[str, list[float]] = {kind: [] for kind in pipes}
    images: dict[str, list[Tensor]] = {kind: [] for kind in pipes}
    total = len(pipes) + batches + (options.pairs if plan else 0)
    with tqdm(total=total, desc=title, unit="batch", leave=False) as bar, ExitStack() as caches:
        _warm_up(options.compiler)
        first = {}
        for kind, pipe in pipes.items():
            caches.enter_context(fresh_cache())
            first[kind], _ = _timed(pipe, 0, bar, options)
        for index in range(batches):
            paired = pipes if index < options.pairs else list(pipes)[-1:]
            for kind in sorted(paired, reverse=bool(index % 2)):
                taken, drawn = _timed(pipes[kind], index, bar, options)
                seconds[kind].append(taken)
                images[kind].append(drawn)
    if plan is not None:
        costs = _costs(plan, pipes["difa"])
        difa_fx.detach(pipes["difa"])
    torch.compiler.reset()
    gc.collect()
    compile_seconds = {kind: first[kind] - statistics.median(seconds[kind]) for kind in pipes}
    return Measured({kind: torch.cat(parts) for kind, parts in images.items()}, seconds, compile_seconds, costs)


def _warm_up(compiler: str) -> None:
    """Load the compiler itself, which no row should pay for."""
    torch.compile(torch.relu, backend=compiler)(torch.ones(2))


def _timed(pipe: Any, index: int, bar: Any, options: argparse.Namespace) -> tuple[float, Tensor]:
    labels = _labels(options.images)[index * options.batch :][: options.batch]
    started = time.perf_counter()
    images = digits.generate(pipe, labels, seed=options.seed + index, steps=options.steps)
    seconds = time.perf_counter() - started
    bar.update()
    return seconds, images


def _costs(plan: Plan, pipe: Any) -> dict[str, Any]:
    (stats,) = difa_fx.stats(pipe.transformer)
    return {
        "flops_kept": kept(plan, stats.shapes, projections=False),
        "flops_kept_with_projections": kept(plan, stats.shapes, projections=True),
        "state_bytes": stats.peak_state_bytes,
    }


if __name__ == "__main__":
    main()
