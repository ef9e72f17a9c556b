"""Handwritten digits twice: with plain Inductor, and under a plan through ``backend="difa"``.

    python examples/demo.py

Ends with a table, ``demo.json`` with the same numbers, and ``demo.png`` with both sets side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from digits import FOLDER, GUIDANCE_SCALE, STEPS, distances, fit_classifier, generate, load_pipeline
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import difa_fx
from difa_fx.cost import kept
from difa_fx.findings import summary
from difa_fx.plan import Plan
from difa_fx.report import plot_plan


@dataclass(frozen=True, slots=True)
class Run:
    """One way of generating, measured.

    Attributes:
        seconds: of one generation, median of the repetitions, after compilation.
        compile_seconds: the first generation less a later one.
        correct: share of digits that the classifier reads as the class asked for.
        flops_kept: fraction of the attention's operations, attention alone.
        flops_kept_with_projections: the same with the projections counted.
        state_bytes: most state held after a step.
        relative_l1: distance to the uncompressed images.
        psnr: peak signal-to-noise ratio to them, dB.
        ssim: structural similarity to them.
    """

    seconds: float
    compile_seconds: float
    correct: float
    flops_kept: float = 1.0
    flops_kept_with_projections: float = 1.0
    state_bytes: int = 0
    relative_l1: float = 0.0
    psnr: float | None = None
    ssim: float = 1.0


def main(argv: Sequence[str] | None = None) -> None:
    """Generate, measure, show."""
    options = _options(argv)
    console = Console()
    plan = _calibrated(options, console) if options.calibrate else Plan.load(options.plan)
    labels = [i % 10 for i in range(options.images)]
    console.print(f"[bold]{len(labels)} digits[/], {plan.steps} steps with guidance, 1 024 tokens; {plan}")

    plain = load_pipeline()
    plain.transformer.compile(backend=options.compiler)
    planned = difa_fx.attach(load_pipeline(), plan, compiler=options.compiler)
    pipes = {"plain": plain, "plan": planned}
    images, first, later = _generate(pipes, labels, plan.steps, options, console)

    (stats,) = difa_fx.stats(planned.transformer)
    classifier = fit_classifier()
    seconds = {name: statistics.median(times) for name, times in later.items()}
    runs = {
        name: Run(seconds[name], first[name] - seconds[name], classifier.accuracy(images[name], labels))
        for name in pipes
    }
    measured = distances(images["plan"], images["plain"]) | {
        "flops_kept": kept(plan, stats.shapes, projections=False),
        "flops_kept_with_projections": kept(plan, stats.shapes, projections=True),
        "state_bytes": stats.peak_state_bytes,
    }
    runs["plan"] = Run(**(asdict(runs["plan"]) | measured))
    console.print(_table(runs))
    _save(options.out, images, labels, runs, plan, stats.pieces)
    console.print(f"pictures: {options.out / 'demo.png'}   numbers: {options.out / 'demo.json'}")


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10, help="digits to draw (default 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=2, help="timed generations of each kind (default 2)")
    parser.add_argument("--plan", type=Path, default=FOLDER / "plan.json")
    parser.add_argument(
        "--calibrate",
        type=float,
        metavar="SPEEDUP",
        help="do not use --plan but find one first that is so many times faster, on two digits (some minutes)",
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the results (default demo)")
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "aot_eager", "eager"))
    return parser.parse_args(argv)


def _calibrated(options: argparse.Namespace, console: Console) -> Plan:
    """A plan found here and now, kept with its figure in the folder of the results."""
    plan = difa_fx.calibrate(
        load_pipeline(),
        [2, 5],
        num_inference_steps=STEPS,
        target_speedup=options.calibrate,
        window=128,
        seed=options.seed + 1,
        guidance_scale=GUIDANCE_SCALE,
        pipeline_kwargs={"output_type": "np"},
        compiler=options.compiler,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    plan.save(options.out / "plan.json")
    console.print(summary(plan))
    console.print(f"plan: {options.out / 'plan.json'}   figure: {plot_plan(plan, options.out / 'plan.png')}")
    return plan


def _generate(
    pipes: dict[str, Any],
    labels: Sequence[int],
    steps: int,
    options: argparse.Namespace,
    console: Console,
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, list[float]]]:
    """Images, seconds of each first generation, and of the later ones, which take turns."""
    images: dict[str, Tensor] = {}
    first: dict[str, float] = {}
    later: dict[str, list[float]] = {name: [] for name in pipes}
    with Progress(console=console, transient=True) as progress:
        for name, pipe in pipes.items():
            task = progress.add_task(f"{name}: compile and generate", total=steps)
            with _shown(pipe, lambda t=task: progress.advance(t)):
                started = time.perf_counter()
                images[name] = generate(pipe, labels, seed=options.seed, steps=steps)
                first[name] = time.perf_counter() - started
        task = progress.add_task("timed generations, in turn", total=options.repeats * len(pipes) * steps)
        for _ in range(options.repeats):
            for name, pipe in pipes.items():
                with _shown(pipe, lambda: progress.advance(task)):
                    started = time.perf_counter()
                    generate(pipe, labels, seed=options.seed, steps=steps)
                    later[name].append(time.perf_counter() - started)
    return images, first, later


class _shown:  # noqa: N801  (a context manager that reads as a word)
    """Call ``step`` after each step of a pipeline's scheduler."""

    def __init__(self, pipe: Any, step: Callable[[], None]) -> None:
        self.scheduler, self.step = pipe.scheduler, step

    def __enter__(self) -> None:
        original = self.scheduler.step

        def step(*args: Any, **kwargs: Any) -> Any:
            self.step()
            return original(*args, **kwargs)

        self.scheduler.step = step

    def __exit__(self, *_: object) -> None:
        del self.scheduler.step


def _table(runs: dict[str, Run]) -> Table:
    plain, plan = runs["plain"], runs["plan"]
    rows = [
        ("seconds per generation", lambda r: f"{r.seconds:.2f}"),
        ("speed-up over Inductor", lambda r: f"{plain.seconds / r.seconds:.2f}x"),
        ("attention FLOPs kept", lambda r: f"{r.flops_kept:.0%}"),
        ("... with projections", lambda r: f"{r.flops_kept_with_projections:.0%}"),
        ("compile seconds", lambda r: f"{r.compile_seconds:.1f}"),
        ("state, MiB at most", lambda r: f"{r.state_bytes / 2**20:.1f}"),
        ("relative L1 to uncompressed", lambda r: f"{r.relative_l1:.4f}"),
        ("PSNR to uncompressed, dB", lambda r: "-" if r.psnr is None else f"{r.psnr:.1f}"),
        ("SSIM to uncompressed", lambda r: f"{r.ssim:.4f}"),
        ("digits read right", lambda r: f"{r.correct:.0%}"),
    ]
    table = Table("", "Inductor", "difa, with the plan")
    for name, cell in rows:
        table.add_row(name, cell(plain), cell(plan))
    return table


def _save(
    folder: Path,
    images: dict[str, Tensor],
    labels: Sequence[int],
    runs: dict[str, Run],
    plan: Plan,
    pieces: int,
) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    shown = min(len(labels), 10)
    figure, axes = plt.subplots(2, shown, figsize=(1.2 * shown, 2.8), squeeze=False)
    for row, name in enumerate(("plain", "plan")):
        for column in range(shown):
            axes[row, column].imshow(images[name][column, 0].numpy(), cmap="gray", vmin=-1, vmax=1)
            axes[row, column].set_axis_off()
        axes[row, 0].set_title("Inductor" if row == 0 else "difa, with the plan", loc="left", fontsize=9)
    figure.tight_layout()
    figure.savefig(folder / "demo.png", dpi=150)
    plt.close(figure)
    result = {name: asdict(run) for name, run in runs.items()} | {
        "speed_up": runs["plain"].seconds / runs["plan"].seconds,
        "images": len(labels),
        "steps": plan.steps,
        "pieces": pieces,
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    (folder / "demo.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
