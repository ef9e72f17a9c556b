"""The greedy search against the paper's plain one, in one run, on the bundled denoiser.

    python benchmarks/search.py -o benchmarks/results/search-cpu-2-cores.json

Plain: the whole denoiser runs, eagerly, for every candidate (tests/plain_search.py).  Both search the same generation
(its calls are recorded beforehand) and must find the same plan; compilation is counted apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import difa_fx
from difa_fx.hardware import hardware
from difa_fx.losses import loss

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]

from digits import load_pipeline  # noqa: E402
from plain_search import plain_search  # noqa: E402


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Search twice, print and write the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threshold", type=float, default=0.1)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--compiler", default="inductor")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(argv)
    model = load_pipeline().transformer
    calls = _recorded(model, options.samples, options.steps)
    compile_seconds, seconds, plan = _ours(model, calls, options)
    with torch.no_grad():
        started = time.perf_counter()
        rows, _, count = plain_search(
            model,
            calls,
            plan.sites,
            threshold=options.threshold,
            loss=loss("paper"),
            window=options.window,
            cfg="cond_first",
            tensor_of=lambda output: output[0],
        )
        plain = time.perf_counter() - started
    same = [[method.value for method in row] for row in plan.methods] == rows
    result = {
        "hardware": hardware(),
        "settings": vars(options) | {"output": None},
        "plain_seconds": plain,
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "ratio": plain / seconds,
        "ratio_with_compilation": plain / (seconds + compile_seconds),
        "plain_calls": count,
        "calls": plan.provenance["calibration"]["calls"],
        "same_plan": same,
    }
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _recorded(model: nn.Module, samples: int, steps: int) -> list[Any]:
    """The calls of a generation, as DiTPipeline makes them."""
    pipe = load_pipeline()
    calls: list[Any] = []

    def record(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((tuple(a.clone() for a in args), {**kwargs, "return_dict": False}))

    handle = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    pipe(list(range(samples)), num_inference_steps=steps, generator=torch.manual_seed(0), output_type="np")
    handle.remove()
    return calls


def _ours(model: nn.Module, calls: Sequence[Any], options: argparse.Namespace) -> tuple[float, float, Any]:
    """Seconds of the compilation, of the search, and the plan."""
    times: list[float] = []

    def sample(denoiser: nn.Module, _: Sequence[Any]) -> Tensor:
        for args, kwargs in calls:
            started = time.perf_counter()
            output = denoiser(*args, **kwargs)[0]
            times.append(time.perf_counter() - started)
        return output

    with tempfile.TemporaryDirectory() as cache:
        plan = difa_fx.calibrate(
            model,
            list(range(options.samples)),
            num_inference_steps=len(calls),
            threshold=options.threshold,
            window=options.window,
            sampler=sample,
            compiler=options.compiler,
            cache_dir=cache,
            verify=0,
        )
    # The first step has no trials: all but a fraction of it is compilation.
    return times[0], sum(times[1:]), plan


if __name__ == "__main__":
    main()
