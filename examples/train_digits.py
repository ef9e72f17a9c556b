"""Train the bundled denoiser from nothing: ``python examples/train_digits.py``.

Attention over 1024 pixels is dear, so most of the learning happens on small grids. The forward process is
defined on the 32x32 grid: the noisy image at level s in (0, 1) is ``(1 - sigma) * image + sigma * noise`` with
``sigma = shift(s)``, just what ``DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=4)`` runs
backwards. An 8x8 or 16x16 stage sees that very image average-pooled: averaging p x p pixels divides the noise,
and not the picture, by p. It also sees the position embedding pooled, and the timestep unchanged. So the
three stages pose one problem at three resolutions, and weights move from one to the next as they are.

The network predicts the clean image, weighted as a velocity: ``|prediction - image|^2 / s^2``, bounded near s = 0.

A run saves its whole state to ``--state`` and takes it up again when restarted with the same settings. Every
random number depends only on the seed, the stage and the step, so a resumed run equals an uninterrupted one.

Shape letters: B images, H and W pixels of the stage's grid, D width of the denoiser.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import sklearn
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, DPMSolverMultistepScheduler
from digits import (
    CLASSES,
    FOLDER,
    GUIDANCE_SCALE,
    NULL_CLASS,
    SIZE,
    STEPS,
    Digits,
    digit_images,
    fit_classifier,
    generate,
    load_pipeline,
)
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

FLOW_SHIFT = 4.0
"""Noise of a 32x32 image relative to that of its 8x8 average, where level s means sigma = s."""

TIMESTEPS = 1000
EVALUATION_SEED = 1
TINY: dict[str, Any] = {
    "steps": [3, 2, 2],
    "batch": [8, 4, 2],
    "warmup": 1,
    "layers": 1,
    "samples": 10,
    "sampler_steps": 2,
    "compile": False,
}


@dataclass(frozen=True, slots=True)
class Stage:
    """One resolution: ``steps`` updates at grid x grid pixels."""

    grid: int
    steps: int
    batch: int
    learning_rate: float


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides what the weights become; saved beside them."""

    stages: tuple[Stage, ...]
    seed: int
    layers: int
    heads: int
    head_dim: int
    warmup: int
    ema_decay: float
    label_dropout: float


@dataclass(slots=True)
class Run:
    """The state of a training run: what is saved, resumed and finally turned into a model folder."""

    model: DiTTransformer2DModel
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    parts: int = 0
    losses: list[float] = field(default_factory=list)


def shift(level: Tensor, factor: float = FLOW_SHIFT) -> Tensor:
    """Multiply the noise-to-signal ratio ``level / (1 - level)`` by ``factor``; return the new level."""
    return factor * level / (1 + (factor - 1) * level)


def new_model(settings: Settings) -> DiTTransformer2DModel:
    """Build the denoiser with DiT's adaLN-zero start, which diffusers leaves to its user."""
    torch.manual_seed(settings.seed)
    model = DiTTransformer2DModel(
        num_attention_heads=settings.heads,
        attention_head_dim=settings.head_dim,
        num_layers=settings.layers,
        in_channels=1,
        out_channels=1,
        sample_size=SIZE,
        patch_size=1,
        num_embeds_ada_norm=NULL_CLASS,
        norm_type="ada_norm_zero",
    )
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        table = block.norm1.emb.class_embedder.embedding_table.weight.data
        used = torch.tensor([*range(CLASSES), NULL_CLASS])
        table[used] = 0.5 * torch.randn(len(used), table.shape[1])
        table[CLASSES:NULL_CLASS] = 0  # never looked up; zeros pack well
    for linear in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    # In train mode every block would draw its own label dropout; `batch_of` drops a label for all of them.
    return model.eval()


def set_grid(model: DiTTransformer2DModel, grid: int) -> None:
    """Turn the 32x32 denoiser into one of grid x grid images by pooling its position embedding."""
    embed = model.pos_embed
    full_1DHW = embed.pos_embed.transpose(1, 2).unflatten(2, (SIZE, SIZE))
    pooled_1ND = F.avg_pool2d(full_1DHW, SIZE // grid).flatten(2).transpose(1, 2)
    embed.pos_embed = pooled_1ND.contiguous()
    embed.height = embed.width = grid


def augment(images_B1HW: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale and move each image a little: at most 6 degrees, 6 % and 1.6 of 32 pixels."""
    count = len(images_B1HW)
    turn, zoom_x, zoom_y, move_x, move_y = torch.rand(5, count, generator=generator) * 2 - 1
    turn, zoom_x, zoom_y = turn * math.radians(6), 1 + 0.06 * zoom_x, 1 + 0.06 * zoom_y
    rows = [
        torch.stack([zoom_x * turn.cos(), -zoom_x * turn.sin(), 0.1 * move_x], 1),
        torch.stack([zoom_y * turn.sin(), zoom_y * turn.cos(), 0.05 * move_y], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images_B1HW.shape), align_corners=False)
    # Samples from outside the image read 0, so black has to be 0 here.
    return F.grid_sample(images_B1HW + 1, grid, mode="bilinear", align_corners=False) - 1


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's data: noisy and clean images [B, 1, H, W]; level, timestep and label [B]."""

    noisy: Tensor
    clean: Tensor
    level: Tensor
    timestep: Tensor
    label: Tensor

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to ``device``."""
        return Batch(*(getattr(self, name).to(device) for name in self.__slots__))


def batch_of(data: Digits, stage: Stage, generator: torch.Generator, label_dropout: float) -> Batch:
    """Draw images, noise levels (one in each B-th of (0, 1), to vary less) and dropped labels."""
    picked_B = torch.randint(len(data.labels), (stage.batch,), generator=generator)
    clean_B1HW = augment(data.images[picked_B], generator)
    clean_B1HW = F.avg_pool2d(clean_B1HW, SIZE // stage.grid)
    offset_B = torch.rand(stage.batch, generator=generator)
    level_B = (torch.arange(stage.batch) + offset_B) / stage.batch
    sigma_B111 = shift(level_B, FLOW_SHIFT * stage.grid / SIZE)[:, None, None, None]
    noise_B1HW = torch.randn(clean_B1HW.shape, generator=generator)
    dropped_B = torch.rand(stage.batch, generator=generator) < label_dropout
    return Batch(
        noisy=(1 - sigma_B111) * clean_B1HW + sigma_B111 * noise_B1HW,
        clean=clean_B1HW,
        level=level_B,
        timestep=(shift(level_B) * TIMESTEPS).long(),
        label=torch.where(dropped_B, NULL_CLASS, data.labels[picked_B]),
    )


def loss_of(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Return the squared error of the predicted clean image, weighted as a velocity's would be."""
    predicted_B1HW = model(batch.noisy, timestep=batch.timestep, class_labels=batch.label).sample
    weight_B = batch.level.clamp(min=0.2) ** -2
    error_B = (predicted_B1HW - batch.clean).square().mean((1, 2, 3))
    loss: Tensor = (weight_B * error_B).mean()
    return loss


def learning_rate(stage: Stage, step: int, warmup: int) -> float:
    """Return the rate at ``step``: a linear start, then half a cosine down to 2 % of the peak."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / stage.steps)
    return stage.learning_rate * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * cosine)


def begin_stage(settings: Settings, index: int, device: torch.device, weights: dict[str, Tensor] | None = None) -> Run:
    """Set up a stage: the weights so far (random if None) and a fresh optimizer and average."""
    model = new_model(settings)
    if weights is not None:
        model.load_state_dict(weights)
    set_grid(model, settings.stages[index].grid)
    model.to(device)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    return Run(model, ema, optimizer, stage=index)


def next_stage(run: Run, settings: Settings) -> Run:
    """Go on from the averaged weights; after the last stage only note that it is done."""
    if run.stage + 1 == len(settings.stages):
        return replace(run, stage=run.stage + 1, step=0)
    weights = run.ema.module.state_dict()
    following = begin_stage(settings, run.stage + 1, run.model.device, weights)
    return replace(following, seconds=run.seconds, parts=run.parts)


def save_run(run: Run, settings: Settings, path: Path) -> None:
    """Write the whole state; a run that dies while writing leaves the last one intact."""
    state = {
        "settings": asdict(settings),
        "model": run.model.state_dict(),
        "ema": run.ema.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        **{name: getattr(run, name) for name in ("stage", "step", "seconds", "parts", "losses")},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    torch.save(state, scratch)
    scratch.replace(path)


def load_run(settings: Settings, path: Path, device: torch.device) -> Run:
    """Take up the run saved at ``path``; refuse one made with other settings."""
    state = torch.load(path, map_location=device, weights_only=True)
    if state["settings"] != asdict(settings):
        raise SystemExit(f"{path} was made with other settings: pass --restart to discard it")
    run = begin_stage(settings, min(state["stage"], len(settings.stages) - 1), device)
    run.model.load_state_dict(state["model"])
    run.ema.load_state_dict(state["ema"])
    run.optimizer.load_state_dict(state["optimizer"])
    for name in ("stage", "step", "seconds", "parts", "losses"):
        setattr(run, name, state[name])
    return run


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a flag that the training loop asks for between two steps."""
    seen: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda number, _: seen.append(number)) for kind in kinds]
    try:
        yield lambda: bool(seen)
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def train(run: Run, settings: Settings, options: argparse.Namespace, console: Console) -> Run:
    """Run every stage that is left, or as much as there is leave for; the state is saved."""
    data, budget = digit_images(), options.stop_after or math.inf
    run.parts += run.stage < len(settings.stages)  # evaluating again is no further part
    with progress_bar(console) as progress, interruptible() as interrupted:
        while run.stage < len(settings.stages):
            stage = settings.stages[run.stage]
            model = torch.compile(run.model, dynamic=False) if options.compile else run.model
            task = progress.add_task(f"{stage.grid}x{stage.grid}", total=stage.steps, loss=math.nan)
            while run.step < stage.steps:
                if interrupted() or budget <= 0:
                    save_run(run, settings, options.state)
                    return run
                train_step(run, model, settings, data)
                budget -= 1
                progress.update(task, completed=run.step, loss=run.losses[-1])
                if run.step % options.save_every == 0:
                    log(run, stage, console)
                    save_run(run, settings, options.state)
            run = next_stage(run, settings)
            save_run(run, settings, options.state)
    return run


def train_step(run: Run, model: Callable[..., Any], settings: Settings, data: Digits) -> None:
    """Make one update of the weights and of their average."""
    start, stage = time.perf_counter(), settings.stages[run.stage]
    generator = torch.Generator().manual_seed((settings.seed * 100 + run.stage) * 10**6 + run.step)
    batch = batch_of(data, stage, generator, settings.label_dropout).to(run.model.device)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(stage, run.step, settings.warmup)
    run.optimizer.zero_grad()
    with torch.enable_grad():  # the caller may have switched gradients off
        loss = loss_of(model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.ema.update_parameters(run.model)
    run.losses = [*run.losses[-99:], loss.item()]
    run.step += 1
    run.seconds += time.perf_counter() - start


def progress_bar(console: Console) -> Progress:
    """Make the bar that a terminal shows."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def log(run: Run, stage: Stage, console: Console) -> None:
    """Print a line now and then where there is no terminal to draw a bar on."""
    if not console.is_terminal:
        mean = sum(run.losses) / len(run.losses)
        console.print(
            f"{stage.grid}x{stage.grid} step {run.step}/{stage.steps} loss {mean:.4f} {run.seconds:.0f} s",
            highlight=False,
        )


def export(run: Run, folder: Path) -> None:
    """Write the averaged weights in half precision, and the scheduler that samples them."""
    model: Any = run.ema.module.half()
    model.save_pretrained(folder)
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=TIMESTEPS,
        prediction_type="sample",
        use_flow_sigmas=True,
        flow_shift=FLOW_SHIFT,
    )
    scheduler.save_pretrained(folder)


def evaluate(folder: Path, samples: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Draw ``samples`` digits with the saved weights and have the classifier read them."""
    classifier = fit_classifier()
    labels = [i % CLASSES for i in range(samples)]
    pipe = load_pipeline(folder=folder, device=device)
    images = generate(pipe, labels, seed=EVALUATION_SEED, steps=steps, batch_size=20)
    return {
        "accuracy": round(classifier.accuracy(images, labels), 4),
        "samples": samples,
        "seed": EVALUATION_SEED,
        "sampler_steps": steps,
        "guidance_scale": GUIDANCE_SCALE,
        "classifier_held_out_accuracy": round(classifier.held_out_accuracy, 4),
    }


def write_record(run: Run, settings: Settings, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write ``training.json``: what was run, on what, and what it reached."""
    record = {
        "evaluation": result,
        "settings": asdict(settings),
        "seconds": round(run.seconds),
        "parts": run.parts,
        "device": run.model.device.type,
        "compiled": options.compile,
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, diffusers, sklearn)},
        },
    }
    scratch = options.out / "training.json.partial"
    scratch.write_text(json.dumps(record, indent=2) + "\n")
    scratch.replace(options.out / "training.json")


def parse(arguments: list[str] | None) -> tuple[Settings, argparse.Namespace]:
    """Read the command line; ``--tiny`` only changes defaults, so other flags still win over it."""
    parser = argparse.ArgumentParser(description="Train the bundled digit denoiser.")
    flag = parser.add_argument
    flag("--grids", type=int, nargs="+", default=[8, 16, 32], help="one stage per grid, the last 32")
    flag("--steps", type=int, nargs="+", default=[1500, 250, 150], help="updates per stage")
    flag("--batch", type=int, nargs="+", default=[64, 32, 16], help="images per update, per stage")
    flag("--rates", type=float, nargs="+", default=[1e-3, 7e-4, 5e-4], help="peak learning rates")
    flag("--warmup", type=int, default=50, help="updates of each stage with a rising learning rate")
    flag("--layers", type=int, default=6)
    flag("--seed", type=int, default=0)
    flag("--samples", type=int, default=200, help="digits to draw for the final evaluation")
    flag("--sampler-steps", type=int, default=STEPS)
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flag("--compile", action=argparse.BooleanOptionalAction, default=True)
    flag("--out", type=Path, default=FOLDER, help="the model folder to write")
    flag("--state", type=Path, default=Path("train_digits.pt"), help="where the run is saved")
    flag("--save-every", type=int, default=50, help="updates between two saves")
    flag("--stop-after", type=int, help="save and leave after this many updates")
    flag("--restart", action="store_true", help="discard a saved run")
    flag("--tiny", action="store_true", help="a few seconds on a small model, to try the script out")
    if parser.parse_known_args(arguments)[0].tiny:
        parser.set_defaults(**TINY)
    options = parser.parse_args(arguments)
    lists = (options.grids, options.steps, options.batch, options.rates)
    if len({len(values) for values in lists}) != 1 or options.grids[-1] != SIZE:
        parser.error("--grids, --steps, --batch and --rates need one value per stage, the last grid 32")
    return settings_of(options), options


def settings_of(options: argparse.Namespace) -> Settings:
    """Pick out of the command line what decides the weights."""
    columns = zip(options.grids, options.steps, options.batch, options.rates, strict=True)
    return Settings(
        stages=tuple(Stage(*column) for column in columns),
        seed=options.seed,
        layers=options.layers,
        heads=4,
        head_dim=32,
        warmup=options.warmup,
        ema_decay=0.99,
        label_dropout=0.1,
    )


def main(arguments: list[str] | None = None) -> int:
    """Train, save, evaluate, report; return 0 if the end was reached and 3 if the run was cut short."""
    settings, options = parse(arguments)
    console, device = Console(), torch.device(options.device)
    if options.restart or not options.state.exists():
        run = begin_stage(settings, 0, device)
    else:
        run = load_run(settings, options.state, device)
        console.print(f"taking up {options.state} at stage {run.stage + 1}, step {run.step}")
    run = train(run, settings, options, console)
    if run.stage < len(settings.stages):
        console.print(f"stopped: run the same command again to go on from {options.state}")
        return 3
    export(run, options.out)
    result = evaluate(options.out, options.samples, options.sampler_steps, device)
    write_record(run, settings, options, result)
    console.print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
