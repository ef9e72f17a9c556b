"""Compile seconds and memory, each contender in a process of its own.

    python -m difa_fx.bench.children '{"size": {...}, "contender": "difa", ...}'

prints one line of JSON.  The parent gives every pair of processes a cache folder that is empty at first: the first
process is cold, the second warm.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from difa_fx.backend import difa
from difa_fx.bench.records import ALLOCATED, RESERVED, RESIDENT, RESIDENT_AFTER, Compiled
from difa_fx.bench.sampling import Denoiser, generate
from difa_fx.bench.settings import SETTLED, Settings, Size, uses_graphs
from difa_fx.bench.shapes import make_subject
from difa_fx.bench.subject import Subject, timesteps
from difa_fx.bench.timing import Spread, ratios
from difa_fx.device_time import timed
from difa_fx.errors import BenchmarkError
from difa_fx.plan import Plan
from difa_fx.session import reset

Answer = dict[str, Any]


def compare(size: Size, settings: Settings, plan: Plan) -> tuple[Compiled, ...]:
    """Eager, Inductor and difa_fx under ``plan``, in processes that take turns.

    The second process of a pair also runs what its memory is measured by: of difa_fx a generation, of the others,
    whose calls are all alike, one step.

    Args:
        size: the denoiser.
        settings: compiler, mode and number of pairs.
        plan: of difa_fx.

    Raises:
        BenchmarkError: a process failed.
    """
    names = [*settings.baselines, "difa"]
    cold: dict[str, list[Answer]] = {name: [] for name in names}
    warm: dict[str, list[Answer]] = {name: [] for name in names}
    for turn in range(settings.processes):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with tempfile.TemporaryDirectory() as folder:
                spec = {
                    "size": asdict(size),
                    "contender": name,
                    "plan": plan.to_dict(),
                    "compiler": settings.compiler,
                    "mode": settings.mode,
                }
                cold[name].append(_child({**spec, "steps": 0}, folder))
                warm[name].append(_child({**spec, "steps": plan.steps if name == "difa" else 1}, folder))
    return tuple(_compiled(name, cold, warm) for name in names)


def _compiled(name: str, cold: Mapping[str, Sequence[Answer]], warm: Mapping[str, Sequence[Answer]]) -> Compiled:
    def seconds(answers: Sequence[Answer]) -> list[float]:
        return [answer["compile_seconds"] for answer in answers]

    compiles = name != "eager"
    return Compiled(
        name=name,
        cold_seconds=Spread.of(seconds(cold[name])) if compiles else None,
        warm_seconds=Spread.of(seconds(warm[name])) if compiles else None,
        cold_to_inductor=Spread.of(ratios(seconds(cold[name]), seconds(cold["inductor"]))) if compiles else None,
        warm_to_inductor=Spread.of(ratios(seconds(warm[name]), seconds(warm["inductor"]))) if compiles else None,
        peak_bytes=max(answer["peak_bytes"] for answer in warm[name]),
        peak_of=warm[name][0]["peak_of"],
    )


def _child(spec: Mapping[str, Any], folder: str) -> Answer:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
    done = subprocess.run(
        [sys.executable, "-m", "difa_fx.bench.children", json.dumps(spec)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchmarkError(
            "a process that measures compilation failed",
            where=f"{spec['contender']} on {spec['size']['shape']}",
            got=f"exit code {done.returncode}: {done.stderr[-2000:]}",
            todo="look at its error; --processes 0 leaves these measurements out",
        )
    answer: Answer = json.loads(done.stdout.splitlines()[-1])
    return answer


def compiled_by(name: str, subject: Subject, plan: Plan | None, compiler: str, mode: str | None) -> Callable[..., Any]:
    """The subject's denoiser as ``eager``, ``inductor``, ``max-autotune`` or ``difa`` runs it, by ``name``."""
    if name == "eager":
        return subject.model
    if name == "difa":
        options: dict[str, Any] = {"plan": plan, "compiler": compiler, "mode": mode}
        # Not by its name, which torch knows only where the package is installed.
        return torch.compile(subject.model, backend=difa, options=options, dynamic=False)
    chosen = "max-autotune" if name == "max-autotune" else mode
    return torch.compile(subject.model, backend=compiler, dynamic=False, mode=chosen)


def main(argv: Sequence[str]) -> None:
    """One process: the first call of a contender, later ones, and a generation for its memory."""
    (text,) = argv
    spec = json.loads(text)
    subject = make_subject(Size(**spec["size"]))
    plan = Plan.from_dict(spec["plan"])
    call = compiled_by(spec["contender"], subject, plan, spec["compiler"], spec["mode"])
    with torch.no_grad():
        # All at the first timestep: difa_fx takes each for the beginning of another generation.
        graphs = subject.size.cuda and uses_graphs(spec["mode"])
        arguments = subject.arguments(subject.noise, timesteps(plan.steps)[0])
        started = time.perf_counter()
        timed(lambda: call(**arguments), subject.size.cuda)
        first = time.perf_counter() - started
        second = min(timed(lambda: call(**arguments), subject.size.cuda) for _ in range(SETTLED if graphs else 1))
        denoiser = Denoiser(call, partial(reset, subject.model))
        # The first generation on CUDA tries kernels out, with memory to empty the cache between them.
        for _ in range(SETTLED - 1 if graphs else int(subject.size.cuda)):
            generate(subject, denoiser, spec["steps"])
        apart = _forget_peak(subject)
        generate(subject, denoiser, spec["steps"])
    answer = {
        "first_seconds": first,
        "second_seconds": second,
        "compile_seconds": first - second,
        **_peak(subject, apart, graphs),
    }
    sys.stdout.write(json.dumps(answer) + "\n")


_PROCESS = Path("/proc/self")


def _forget_peak(subject: Subject) -> bool:
    """Let the peak of memory be that of what comes now; False where the system cannot."""
    if subject.size.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _peak(subject: Subject, apart: bool, graphs: bool) -> dict[str, Any]:
    if graphs:
        return {"peak_bytes": torch.cuda.max_memory_reserved(), "peak_of": RESERVED}
    if subject.size.cuda:
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "peak_of": ALLOCATED}
    status = _PROCESS / "status"
    if not status.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "peak_of": RESIDENT}
    # Not ru_maxrss: a process begins with that of the one that started it.
    (line,) = (line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
    return {"peak_bytes": int(line.split()[1]) * 1024, "peak_of": RESIDENT_AFTER if apart else RESIDENT}


if __name__ == "__main__":
    main(sys.argv[1:])
