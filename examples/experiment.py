"""The story that the scripts ``run_*.py`` share.

::

    options -> subject: a denoiser, with what runs its generations
        -> a plan, searched for or read -> the denoiser compiled twice: plainly, and under the plan
        -> generations of both that take turns, timed -> pictures of both, judged -> a line in results.jsonl

Letters: B samples, T frames, C channels, H, W pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from experiment_options import parse
from rich.console import Console
from rich.table import Table
from subjects import Subject
from torch import Tensor, nn
from videos import frame_distances, save_video

import difa_fx
from difa_fx.cost import kept
from difa_fx.errors import DifaError
from difa_fx.evaluation import evaluate, generate_images
from difa_fx.hardware import hardware, versions
from difa_fx.plan import Plan


def main(
    script: str,
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    subject_of: Callable[[argparse.Namespace], Subject],
) -> int:
    """Run an experiment; 0, or 2 after an error that was printed."""
    try:
        options = parse(parser, argv)
        record = run(script, subject_of(options), options)
    except DifaError as error:
        print(f"{script}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    show(record)
    return 0


def run(script: str, subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """The experiment; its record is also the last line of ``results.jsonl`` in the folder of results."""
    options.window_size = options.window_size or max(1, subject.tokens // 8)
    folder = options.output / _name(subject, options)
    record: dict[str, Any] = {"script": script, "model": subject.name, "settings": _settings(options)}
    plan = None if options.raw_eval else _plan(subject, options, folder, record)
    denoisers = _compiled(subject.denoiser, plan, options)
    record["timing"] = _timing(subject, denoisers, options)
    if plan is not None:
        record["plan"] |= _costs(plan, subject.denoiser)
    if not options.debug:
        record["evaluation"] = _judged(subject, denoisers, options, folder, record)
    record |= {"hardware": hardware(), "versions": versions()}
    if torch.cuda.is_available():
        record["cuda_peak_bytes"] = torch.cuda.max_memory_allocated()
    _append(options.output / "results.jsonl", record)
    return record


def _plan(subject: Subject, options: argparse.Namespace, folder: Path, record: dict[str, Any]) -> Plan:
    """The plan, searched for unless it was given, and kept in ``folder`` under a name of its own."""
    started = time.perf_counter()
    if options.plan is not None:
        plan = Plan.load(options.plan)
    else:
        plan = difa_fx.calibrate(
            subject.target,
            subject.calibration,
            num_inference_steps=options.n_steps,
            window=options.window_size,
            candidates=options.ablation,
            loss=options.metric,
            cfg=subject.order,
            seed=options.seed,
            verify=0,
            resume=options.use_cache,
            cache_dir=folder / "searches",
            compiler=options.compiler,
            **options.goal,
            **subject.arguments,
        )
        record["search_seconds"] = time.perf_counter() - started
    content = {name: value for name, value in plan.to_dict().items() if name != "provenance"}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:10]
    folder.mkdir(parents=True, exist_ok=True)
    plan.save(folder / f"plan-{digest}.json")
    counts = {method.value: count for method, count in plan.counts().items()}
    record["plan"] = {"file": str(folder / f"plan-{digest}.json"), "digest": digest, "methods": counts}
    return plan


def _compiled(denoiser: nn.Module, plan: Plan | None, options: argparse.Namespace) -> dict[str, Any]:
    """The denoiser by kind: compiled as users compile it, and under the plan."""
    torch._dynamo.reset()
    made: dict[str, Any] = {"plain": torch.compile(denoiser, backend=options.compiler, dynamic=False)}
    if plan is not None:
        settings = {"plan": plan, "compiler": options.compiler}
        made["plan"] = torch.compile(denoiser, backend="difa", options=settings, dynamic=False)
    return made


def _drawn(subject: Subject, denoiser: nn.Module, samples: Sequence[Any], seeds: Sequence[int]) -> Tensor:
    """One generation, begun afresh whatever became of the one before."""
    difa_fx.reset(subject.denoiser)
    with torch.no_grad():
        return subject.draw(denoiser, samples, seeds)


def _timing(subject: Subject, denoisers: Mapping[str, nn.Module], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of generations that take turns, after one of each that compiles."""
    samples = [subject.evaluation[i % len(subject.evaluation)] for i in range(options.time_batch)]

    def seconds(denoiser: nn.Module) -> float:
        started = time.perf_counter()
        _drawn(subject, denoiser, samples, range(len(samples)))
        return time.perf_counter() - started

    first = {kind: seconds(denoiser) for kind, denoiser in denoisers.items()}
    later: dict[str, list[float]] = {kind: [] for kind in denoisers}
    for turn in range(max(1, options.time_pairs)):
        for kind in sorted(denoisers, reverse=bool(turn % 2)):
            later[kind].append(seconds(denoisers[kind]))
    typical = {kind: statistics.median(values) for kind, values in later.items()}
    found: dict[str, Any] = {"batch": options.time_batch, "pairs": len(later["plain"]), "seconds": typical}
    found["first_seconds"] = first
    if "plan" in later:
        ratios = [plain / own for plain, own in zip(later["plain"], later["plan"], strict=True)]
        found["speed_up"] = {"median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}
    return found


def _costs(plan: Plan, denoiser: nn.Module) -> dict[str, Any]:
    """Shares of the attention's operations that the plan keeps, and the bytes of state it holds."""
    graphs = difa_fx.stats(denoiser)
    shapes = {path: shape for graph in graphs for path, shape in graph.shapes.items()}
    return {
        "flops_kept": kept(plan, shapes, projections=False),
        "flops_kept_with_projections": kept(plan, shapes, projections=True),
        "state_bytes": max(graph.peak_state_bytes for graph in graphs),
    }


def _judged(
    subject: Subject,
    denoisers: Mapping[str, nn.Module],
    options: argparse.Namespace,
    folder: Path,
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """Pictures of every kind in folders of their own, and what they are worth."""
    samples = list(subject.evaluation[: options.eval_n_images])
    digest = record.get("plan", {}).get("digest")
    names = {"plain": f"uncompressed-{len(samples)}", "plan": f"images-{digest}-{len(samples)}"}
    places = {kind: folder / names[kind] for kind in denoisers}
    if subject.video:
        return _judged_videos(subject, denoisers, samples, places, options)
    known = {"model": subject.name, "steps": options.n_steps, "cfg_scale": options.cfg_scale}
    for kind, denoiser in denoisers.items():
        made_by = known | ({"plan": digest} if kind == "plan" else {})
        draw, size = partial(_drawn, subject, denoiser), options.eval_batchsize
        generate_images(draw, samples, places[kind], batch_size=size, seed=options.seed, settings=made_by)
    last = places["plan" if "plan" in places else "plain"]
    found = evaluate(
        last,
        real=options.eval_real_image_path,
        uncompressed=places["plain"] if "plan" in places else None,
        clip=getattr(options, "clip", None),
        checkpoint=options.output / "measured",
    )
    return {"folder": str(last), **found.as_dict()}


def _judged_videos(
    subject: Subject,
    denoisers: Mapping[str, nn.Module],
    samples: Sequence[Any],
    places: Mapping[str, Path],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Videos in files, and the distance of each frame to the uncompressed one."""
    drawn: dict[str, Tensor] = {}
    files: dict[str, list[str]] = {}
    for kind, denoiser in denoisers.items():
        drawn[kind] = _in_batches(partial(_drawn, subject, denoiser), samples, options.eval_batchsize, options.seed)
        paths = [save_video(video, places[kind] / f"{i:05d}") for i, video in enumerate(drawn[kind])]
        files[kind] = list(map(str, paths))
    found: dict[str, Any] = {"videos": len(samples), "files": files}
    if "plan" in drawn:
        found["frames"] = frame_distances(drawn["plan"], drawn["plain"])
        for name, values in found["frames"].items():
            known = [value for value in values if value is not None]
            found[name] = statistics.fmean(known) if known else None
    return found


def _in_batches(draw: Callable[..., Tensor], samples: Sequence[Any], size: int, seed: int) -> Tensor:
    """All samples, in batches of one size: the last repeats its last sample, since a compiled batch is fixed."""
    parts = []
    for start in range(0, len(samples), size):
        numbers = [min(i, len(samples) - 1) for i in range(start, start + size)]
        seeds = [seed * 100_003 + number for number in numbers]
        parts.append(draw([samples[number] for number in numbers], seeds))
    return torch.cat(parts)[: len(samples)]


def show(record: Mapping[str, Any]) -> None:
    """Print what matters of a record."""
    timing, plan, judged = record["timing"], record.get("plan", {}), record.get("evaluation", {})
    rows = {f"seconds, {kind} (batch {timing['batch']})": value for kind, value in timing["seconds"].items()}
    if "speed_up" in timing:
        rows["speed-up over plain compilation"] = timing["speed_up"]["median"]
        rows["attention operations kept"] = plan["flops_kept"]
        rows["... with projections"] = plan["flops_kept_with_projections"]
    names = ("fid", "inception_score", "clip_score", "psnr", "ssim", "lpips", "relative_l1")
    rows |= {name: judged[name] for name in names if judged.get(name) is not None}
    table = Table("", record["model"])
    for name, value in rows.items():
        table.add_row(name, f"{float(value):.4g}")
    console = Console()
    console.print(table)
    for frame, values in enumerate(zip(*judged.get("frames", {}).values(), strict=True)):
        shown = (f"{name} {'-' if v is None else f'{v:.4g}'}" for name, v in zip(judged["frames"], values, strict=True))
        console.print(f"frame {frame}: {', '.join(shown)}")
    for name, reason in judged.get("skipped", {}).items():
        console.print(f"{name} left out: {reason}", markup=False)


def _name(subject: Subject, options: argparse.Namespace) -> str:
    """A folder for all plans whose pictures have the same uncompressed ones."""
    negative = getattr(options, "negative_prompt", "")
    parts = [subject.name, f"steps{options.n_steps}", f"cfg{options.cfg_scale:g}", f"seed{options.seed}", negative]
    return re.sub(r"[^\w.+-]+", "_", "_".join(filter(None, parts)))


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def _append(path: Path, record: Mapping[str, Any]) -> None:
    line = json.dumps(record, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    # One write to a file opened for appending: scripts that run side by side do not mix their lines.
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())
