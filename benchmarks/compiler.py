"""What the compiler costs and saves against Inductor, in one run, as paired and interleaved measurements.

    python benchmarks/compiler.py -o benchmarks/results/cpu.json

Parts: ``cold`` compile seconds of a deep denoiser under a real plan, each in a fresh process with an empty cache,
and ``warm`` in a second process; ``overhead`` of a plan that is full everywhere, per call; ``cached``: a call of the
bundled denoiser with every site cached; ``dispatch`` microseconds a piece.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

import difa_fx
from difa_fx import registry
from difa_fx.hardware import hardware, machine_line
from difa_fx.plan import Plan
from difa_fx.runtime import Runner

ROOT = Path(__file__).resolve().parent.parent
PLAN = ROOT / "tests" / "plans" / "dit-xl-2-512_20steps_t0.15.json"
PARTS = ("cold", "overhead", "overhead_digits", "cached", "dispatch")
TARGETS = {"cold": 0.5, "overhead": 1.02, "overhead_digits": 1.02, "cached": 0.45}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, write JSON."""
    options = _options(argv)
    if options.child:
        _compile_once(options)
        return {}
    result: dict[str, Any] = {"hardware": hardware(), "settings": vars(options) | {"output": None}}
    with torch.no_grad():
        for part in options.parts:
            print(f"{part} ...", file=sys.stderr)
            result |= MEASURE[part](options)
    table = _markdown(result)
    print(table)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    return result


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=16)
    parser.add_argument("--size", type=int, default=32, help="latents' height and width; tokens are size^2 / 4")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--digits", type=int, default=8, help="batch of the bundled denoiser, both halves")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--cold-repeats", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--child", choices=("difa", "inductor"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _denoiser(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """A DiT of random weights and the arguments of a call."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=options.heads,
        attention_head_dim=options.head_dim,
        in_channels=4,
        num_layers=options.layers,
        sample_size=options.size,
        patch_size=2,
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=1000,
    ).eval()
    half = torch.randn(options.batch // 2, 4, options.size, options.size)
    labels = torch.arange(options.batch)
    return model, {"hidden_states": torch.cat([half, half]), "class_labels": labels, "return_dict": False}


def _call(model: Callable[..., Any], inputs: Mapping[str, Any], timestep: int) -> Any:
    batch = inputs["hidden_states"].shape[0]
    return model(**inputs, timestep=torch.full((batch,), timestep))


def _cold(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds from the first call to its result; processes take turns."""
    seconds: dict[str, list[float]] = {"inductor": [], "difa": []}
    warm: dict[str, list[float]] = {"inductor": [], "difa": []}
    pieces = 0
    for _ in range(options.cold_repeats):
        for kind, cold in seconds.items():
            with tempfile.TemporaryDirectory() as cache:
                first = _child(kind, options, cache)
                cold.append(first["seconds"])
                warm[kind].append(_child(kind, options, cache)["seconds"])
            pieces = max(pieces, first.get("pieces", 0))
    return {
        "cold": _pair(seconds["difa"], seconds["inductor"]) | {"pieces": pieces},
        "warm": _pair(warm["difa"], warm["inductor"]),
    }


def _child(kind: str, options: argparse.Namespace, cache: str) -> dict[str, Any]:
    sizes = ("layers", "heads", "head_dim", "size", "batch")
    flags = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in sizes]
    done = subprocess.run(
        [sys.executable, __file__, "--child", kind, *flags],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _compile_once(options: argparse.Namespace) -> None:
    model, inputs = _denoiser(options)
    plan = _deep_plan(options)
    with torch.no_grad():
        _call(model, inputs, 999)
        compiled = _compiled(model, None if options.child == "inductor" else plan)
        started = time.perf_counter()
        _call(compiled, inputs, 999)
        answer: dict[str, Any] = {"seconds": time.perf_counter() - started}
    if options.child == "difa":
        answer["pieces"] = _runner(compiled).stats.pieces
    print(json.dumps(answer))


def _deep_plan(options: argparse.Namespace) -> Plan:
    """The published plan, with its window scaled to an eighth of the tokens and as many layers as asked for."""
    plan = Plan.load(PLAN)
    layers = min(options.layers, len(plan.sites))
    rows = [row[:layers] for row in plan.methods]
    return plan.replace(sites=plan.sites[:layers], methods=rows, window=max(options.size**2 // 32, 1))


def _compiled(model: nn.Module, plan: Plan | None) -> Any:
    if plan is None:
        return torch.compile(model, backend="inductor", dynamic=False)
    return torch.compile(model, backend="difa", options={"plan": plan}, dynamic=False)


def _runner(compiled: Any) -> Runner:
    (runner,) = registry.runners(compiled)
    return runner


def _overhead(options: argparse.Namespace) -> dict[str, Any]:
    """A plan of full alone against the whole graph, on the deep denoiser."""
    model, inputs = _denoiser(options)
    return {"overhead": _race(model, inputs, ["full", "full"], options.repeats)}


def _overhead_digits(options: argparse.Namespace) -> dict[str, Any]:
    """The same on the bundled denoiser."""
    model, inputs = _digits(options)
    return {"overhead_digits": _race(model, inputs, ["full", "full"], options.repeats)}


def _cached(options: argparse.Namespace) -> dict[str, Any]:
    model, inputs = _digits(options)
    return {"cached": _race(model, inputs, ["full", "cached"], options.repeats)}


def _digits(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    sys.path.insert(0, str(ROOT / "examples"))
    from digits import load_pipeline

    model = load_pipeline().transformer
    half = torch.randn(options.digits // 2, 1, 32, 32)
    labels = torch.arange(options.digits) % 10
    return model, {"hidden_states": torch.cat([half, half]), "class_labels": labels, "return_dict": False}


def _race(model: nn.Module, inputs: Mapping[str, Any], rows: Sequence[str], repeats: int) -> dict[str, Any]:
    """Seconds of the second of two steps under a plan, and of Inductor's call of it, in turn."""
    sites = [site for report in difa_fx.inspect(model, timestep=torch.tensor([9]), **inputs) for site in report.sites]
    paths = [site.path for site in sites]
    plan = Plan(
        steps=2, sites=paths, methods=[[row] * len(paths) for row in rows], window=8, cfg=None, timesteps=(9, 5)
    )
    torch._dynamo.reset()
    plain, planned = _compiled(model, None), _compiled(model, plan)
    seconds: dict[str, list[float]] = {"difa": [], "inductor": []}
    for repeat in range(repeats + 2):
        _call(planned, inputs, 9)
        times = {"difa": _timed(planned, inputs), "inductor": _timed(plain, inputs)}
        if repeat >= 2:
            for kind, value in times.items():
                seconds[kind].append(value)
    return _pair(seconds["difa"], seconds["inductor"])


def _timed(model: Any, inputs: Mapping[str, Any]) -> float:
    started = time.perf_counter()
    _call(model, inputs, 5)
    return time.perf_counter() - started


def _dispatch(options: argparse.Namespace) -> dict[str, Any]:
    """Microseconds a piece that a step's loop adds, with the pieces' own work taken out."""
    model, inputs = _denoiser(options)
    sites = [f"transformer_blocks.{i}.attn1" for i in range(options.layers)]
    compiled = torch.compile(
        model,
        backend="difa",
        options={"plan": Plan.full(sites, steps=1), "compiler": "eager"},
        dynamic=False,
    )
    _call(compiled, inputs, 9)
    runner = _runner(compiled)
    (session,) = runner.sessions
    calls = [_without_work(call) for call in runner.programs[0]]
    times = []
    for _ in range(200):
        started = time.perf_counter()
        runner._builder.run_program(tuple(calls), [], session.state)
        times.append((time.perf_counter() - started) / len(calls) * 1e6)
    return {"dispatch": {"microseconds_a_piece": statistics.median(times), "pieces": len(calls)}}


def _without_work(call: Any) -> Any:
    results = (None,) * len(call.outputs)
    return replace(call, run=lambda *_: results)


def _pair(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Medians and their ratio, and the ratio of each pair: median, least and largest."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "difa_seconds": statistics.median(ours),
        "inductor_seconds": statistics.median(theirs),
        "ratio": statistics.median(ours) / statistics.median(theirs),
        "ratio_of_pairs": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "pairs": len(ratios),
    }


def _markdown(result: Mapping[str, Any]) -> str:
    hardware = result["hardware"]
    lines = [
        f"{machine_line(hardware)}, torch {hardware['torch']}",
        "",
        "| measured | difa s | Inductor s | ratio (least - largest) | target |",
        "|---|---|---|---|---|",
    ]
    for name in ("cold", "warm", "overhead", "overhead_digits", "cached"):
        if name in result:
            row = result[name]
            low, high = row["ratio_range"]
            lines.append(
                f"| {name} | {row['difa_seconds']:.3f} | {row['inductor_seconds']:.3f} "
                f"| {row['ratio']:.3f} ({low:.3f} - {high:.3f}) | {TARGETS.get(name, '')} |"
            )
    if "dispatch" in result:
        row = result["dispatch"]
        lines += ["", f"Dispatch: {row['microseconds_a_piece']:.1f} us a piece, {row['pieces']} pieces a step."]
    return "\n".join(lines)


MEASURE = {
    "cold": _cold,
    "overhead": _overhead,
    "overhead_digits": _overhead_digits,
    "cached": _cached,
    "dispatch": _dispatch,
}

if __name__ == "__main__":
    main()
