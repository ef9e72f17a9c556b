"""Which blocks serve the Triton kernels for windows: every candidate beside `scaled_dot_product_attention`, on CUDA.

    python benchmarks/tune_windows.py -o tuned.json --budget 110

A window is an eighth of the tokens to either side; ``near`` adds a residual, ``refresh`` is full attention with a new
residual.  All candidates are compiled first, by many processes.  One process then checks and times them one after the
other, in CUDA graphs; where a candidate kills it, or takes too long, another goes on with the rest.  What a candidate
must get right: a refresh is full attention, a window step with its residual is so, too, and a window step is attention
under a mask.  ``error`` is the largest of these, as relative L2 distance.

A candidate is a kernel and its sizes: ``maps`` and ``pointers`` are :mod:`difa_fx.cuda_kernels` with tensor maps and
without, ``gluon`` is ``tune_windows_hopper.py``.  ``--dry`` runs all but the compilation, the timing and ``gluon`` on a
CPU, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

CANDIDATES: dict[str, list[tuple[int | None, ...]]] = {
    "near": [
        (128, 64, 8, 3, 128),
        (64, 64, 4, 2, 128),
        (64, 64, 4, 3, 128),
        (128, 64, 4, 3, None),
        (64, 128, 4, 2, None),
        (128, 64, 8, 2, 128),
        (128, 128, 8, 2, None),
        (128, 32, 8, 4, 128),
    ],
    "refresh": [
        (128, 64, 8, 3, 128),
        (64, 64, 4, 2, 128),
        (64, 64, 4, 2, 168),
        (64, 128, 4, 2, None),
        (128, 64, 4, 3, None),
        (128, 64, 8, 3, None),
        (128, 128, 8, 2, None),
    ],
}
"""Queries of a block, keys of a tile, warps, stages and registers, for each operator."""

POINTERS = [(64, 64, 4, 3, 128)]
"""Tried without tensor maps, too."""

HOPPER = [
    (64, 128, 2, 2, 168, 240),
    (64, 64, 4, 3, 128, 160),
    (64, 64, 3, 1, 80, 136),
    (64, 128, 2, 1, 128, 232),
    (64, 64, 3, 1, 128, 232),
    (64, 64, 4, 2, 168, 240),
    (128, 64, 3, 2, 168, 240),
]
"""Of the kernel in Gluon: queries of a group of warps, keys, stages, groups, and registers at launch and then."""

SHAPES = [(4096, 72), (1024, 72), (16384, 64), (4096, 64), (1024, 64), (16384, 72)]
"""Tokens and width of a head, those first that matter most."""

TOO_LONG = 15.0
"""Seconds after which a candidate is given up: it hangs."""

FIRST = 40.0
"""The same for the first of a process, which has to start."""

TOLERANCE = 1e-2

Job = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> list[Job]:
    """Compile, measure, print a table for each shape and write the numbers."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="path of the JSON file")
    parser.add_argument("--tokens", type=int, nargs="+", default=(1024, 4096, 16384))
    parser.add_argument("--head-dims", type=int, nargs="+", default=(64, 72))
    parser.add_argument("--budget", type=float, default=110.0, help="seconds, for everything")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="that compile")
    parser.add_argument("--dry", action="store_true", help="on a CPU, in the interpreter")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    sys.path[:0] = [str(Path(__file__).resolve().parent)]
    if options.child:
        _serve(json.loads(sys.stdin.readline()))
        return []
    deadline = started + options.budget
    jobs = _jobs(options)
    failed: list[Job] = []
    if not options.dry:
        failed = _compile_all(jobs, options.processes, deadline)
        print(f"compiled in {time.monotonic() - started:.0f} s, {len(failed)} failed", flush=True)
    bad = {_name(job) for job in failed}
    jobs = [job for job in jobs if _name(job) not in bad]
    results = _measure_all(jobs, deadline)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"results": results, "not compiled": failed}, indent=1) + "\n")
    print(_tables(results), *(f"NOT COMPILED {_name(job)}: {job['failure']}" for job in failed), sep="\n")
    print(f"{time.monotonic() - started:.0f} s")
    return results


def _jobs(options: argparse.Namespace) -> list[Job]:
    shapes = [(n, d) for n, d in SHAPES if n in options.tokens and d in options.head_dims]
    shapes += [(n, d) for n in options.tokens for d in options.head_dims if (n, d) not in SHAPES]
    found: list[Job] = []
    for tokens, width in shapes:
        shape = {"tokens": tokens, "width": width, "dry": options.dry}
        found.append(shape | {"operator": "full"})
        for operator, candidates in CANDIDATES.items():
            fits = [sizes for sizes in HOPPER if operator == "near" or sizes[0] == 64]  # the rest would spill
            hopper = [] if options.dry else fits
            found += [shape | {"operator": operator, "sizes": sizes, "kind": "maps"} for sizes in candidates]
            found += [shape | {"operator": operator, "sizes": sizes, "kind": "gluon"} for sizes in hopper]
            found += [shape | {"operator": operator, "sizes": sizes, "kind": "pointers"} for sizes in POINTERS]
    return found


def _name(job: Job) -> str:
    """What is compiled: the number of tokens does not matter for it."""
    if job["operator"] == "full":
        return f"full D={job['width']}"
    return f"{job['operator']} D={job['width']} {job['kind']} {'-'.join(str(size or 'x') for size in job['sizes'])}"


def _compile_all(jobs: Sequence[Job], processes: int, deadline: float) -> list[Job]:
    """Warm Triton's cache; gives what does not compile, with the reason."""
    distinct = list({_name(job): job for job in jobs if job["operator"] != "full"}.values())
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    running = {pool.submit(_compile, job): job for job in distinct}
    failed = []
    with contextlib.suppress(TimeoutError):
        for future in as_completed(running, timeout=max(1.0, deadline - time.monotonic())):
            error = future.exception()
            if error is not None:
                failed.append(running[future] | {"failure": _reason(error)})
    pool.shutdown(wait=False, cancel_futures=True)
    return failed


def _compile(job: Job) -> None:
    sys.path[:0] = [str(Path(__file__).resolve().parent)]
    from difa_fx import cuda_kernels

    if job["kind"] == "gluon":
        _call(job | {"tokens": 256}, _tensors(job | {"tokens": 256}), warm=True)
        return
    kernel = cuda_kernels.near_kernel

    class NotLaunched:
        def __getitem__(self, grid: object) -> Callable[..., object]:
            return lambda *args, **settings: kernel.warmup(*args, grid=grid, **settings)

    cuda_kernels.near_kernel = NotLaunched()  # type: ignore[assignment]
    try:
        _call(job | {"tokens": 256}, _tensors(job | {"tokens": 256}))
    finally:
        cuda_kernels.near_kernel = kernel


def _measure_all(jobs: list[Job], deadline: float) -> list[Job]:
    """Every job in a process that serves until one of them breaks it."""
    results: list[Job] = []
    waiting = list(jobs)
    breakdowns = 0
    while waiting and time.monotonic() < deadline - 8:
        with _child(waiting) as lines:
            answers, failure = _answers(lines, len(waiting), deadline)
        if len(answers) < len(waiting) and not (answers and answers[-1].get("fatal")):
            answers.append(waiting[len(answers)] | {"failure": failure})
        results += answers
        waiting = waiting[len(answers) :]
        if answers[-1].get("kind") == "gluon":
            breakdowns += 2 if failure == "took too long" else 1
        if breakdowns >= 2:  # the others would do so, too, and each costs a new process
            waiting = [job for job in waiting if job.get("kind") != "gluon"]
    return results + [job | {"failure": "no time left"} for job in waiting]


def _answers(lines: queue.Queue[str | None], count: int, deadline: float) -> tuple[list[Job], str]:
    """What a process answers, up to ``count`` jobs, and why no more."""
    found: list[Job] = []
    failure = "the process ended"
    while len(found) < count and not (found and found[-1].get("fatal")):
        patience = TOO_LONG if found else FIRST
        try:
            line = lines.get(timeout=max(0.1, min(patience, deadline - time.monotonic())))
        except queue.Empty:
            return found, "took too long"
        if line is None:
            break
        if line.startswith("{"):
            found.append(json.loads(line))
        elif line.strip():
            failure = line.strip()[-300:]
    return found, failure


@contextlib.contextmanager
def _child(jobs: Sequence[Job]) -> Iterator[queue.Queue[str | None]]:
    """A process that measures jobs, and the lines that it prints; None is its end."""
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if jobs[0]["dry"] else {})
    command = [sys.executable, "-W", "ignore", __file__, "--child", "-o", os.devnull]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert process.stdin is not None and process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    process.stdin.write(json.dumps(list(jobs)) + "\n")
    process.stdin.close()
    try:
        yield lines
    finally:
        process.kill()
        process.wait()


def _serve(jobs: Sequence[Job]) -> None:
    """Measure jobs and print each as a line of JSON."""
    import torch

    torch.set_grad_enabled(False)
    reference: dict[str, Any] = {}
    for job in jobs:
        answer = dict(job)
        try:
            shape = (job["tokens"], job["width"])
            if reference.get("shape") != shape:
                reference.clear()
                reference.update(_reference(job), shape=shape)
            answer |= _full(job, reference) if job["operator"] == "full" else _candidate(job, reference)
        except Exception as error:  # noqa: BLE001  one that fails must not stop the others
            answer["failure"] = _reason(error)
            answer["fatal"] = any(word in str(error) for word in ("CUDA error", "illegal", "misaligned", "launch fail"))
        print(json.dumps(answer), flush=True)


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    last = f" ... {lines[-1][:200]}" if len(lines) > 1 else ""  # where Triton says what is wrong
    return f"{type(error).__name__}: {lines[0][:200]}{last}"


def _tensors(job: Job) -> tuple[Any, ...]:
    """Queries, keys and values [B, H, N, D], and a residual [B, N, H, D]."""
    import torch

    place = {"device": "cpu", "dtype": torch.float32} if job["dry"] else {"device": "cuda", "dtype": torch.bfloat16}
    batch, heads = (1, 1) if job["dry"] else (2, 16)
    torch.manual_seed(job["tokens"])
    q, k, v, residual = (torch.randn(batch, job["tokens"], heads, job["width"], **place) for _ in range(4))
    residual *= 0.02  # no larger than attention of noise
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), residual


def _call(job: Job, tensors: Sequence[Any], **settings: bool) -> tuple[Any, ...]:
    from difa_fx.cuda_window import attend_in

    q, k, v, residual = tensors
    refresh = job["operator"] == "refresh"
    residual = None if refresh else residual
    window, sizes = job["tokens"] // 8, tuple(job["sizes"])
    if job["kind"] == "gluon":
        from tune_windows_hopper import attend_hopper

        return attend_hopper(sizes, q, k, v, residual, window, refresh=refresh, **settings)
    maps = job["kind"] == "maps"
    return attend_in(sizes, q, k, v, residual, window, (0, 0), None, refresh=refresh, maps=maps)


def _reference(job: Job) -> dict[str, Any]:
    """Tensors, full attention, and attention under the window's mask, some queries at a time."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    tensors = _tensors(job)
    q, k, v, _ = tensors
    places = torch.arange(job["tokens"], device=q.device)
    parts = []
    for rows in places.split(2048):
        mask = (rows[:, None] - places[None]).abs() <= job["tokens"] // 8
        parts.append(scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=mask).transpose(1, 2))
    return {
        "tensors": tensors,
        "full": scaled_dot_product_attention(q, k, v).transpose(1, 2),
        "near": torch.cat(parts, 1),
    }


def _full(job: Job, reference: dict[str, Any]) -> Job:
    """Time of full attention, the kernel that it is, and the rounding error that is usual (of its first head)."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v, _ = reference["tensors"]

    def attend() -> object:
        return scaled_dot_product_attention(q, k, v)

    reference["seconds"] = _seconds(job, attend)
    exact = scaled_dot_product_attention(*(t[:1, :1].float() for t in (q, k, v))).transpose(1, 2)
    answer: Job = {"seconds": reference["seconds"], "error": _apart(reference["full"][:1, :, :1], exact)}
    if not job["dry"]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            attend()
            torch.cuda.synchronize()
        names = [event.key for event in profile.key_averages() if "Memset" not in event.key]
        answer["kernel"] = ", ".join(name[:90] for name in names[:3])
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
                answer["kernel"] += f"; {backend.name} {_seconds(job, attend) * 1e6:.0f} us"
    return answer


def _candidate(job: Job, reference: dict[str, Any]) -> Job:
    """Time and error of one candidate."""
    from torch.nn.functional import scaled_dot_product_attention

    tensors = reference["tensors"]
    full = reference["full"]
    if job["operator"] == "refresh":
        got, missed = _call(job, tensors)
        (again,) = _call(job | {"operator": "near"}, (*tensors[:3], missed))
        errors = [_apart(got, full), _apart(got.float() - missed.float(), reference["near"]), _apart(again, full)]
    else:
        errors = [_apart(_call(job, tensors)[0].float() - tensors[3].float(), reference["near"])]
    answer: Job = {"error": max(errors)}
    if not answer["error"] < TOLERANCE:
        return answer | {"failure": f"wrong: {', '.join(f'{error:.3g}' for error in errors)}"}
    if "seconds" not in reference:  # another process had measured it
        reference["seconds"] = _seconds(job, lambda: scaled_dot_product_attention(*tensors[:3]))
    return answer | {"seconds": _seconds(job, lambda: _call(job, tensors)), "full": reference["seconds"]}


def _apart(got: Any, want: Any) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def _seconds(job: Job, run: Callable[[], object]) -> float:
    if job["dry"]:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    from difa_fx.device_time import seconds_of

    return seconds_of(run)


def _tables(results: Sequence[Job]) -> str:
    """One table for each shape, the fastest first."""
    lines = []
    shapes = list(dict.fromkeys((job["tokens"], job["width"]) for job in results))
    for tokens, width in shapes:
        own = [job for job in results if (job["tokens"], job["width"]) == (tokens, width)]
        pairs = {"full": tokens**2, "refresh": tokens**2, "near": _pairs(tokens, tokens // 8)}
        lines.append(f"\n== {tokens} tokens, head {width}")
        for operator in ("full", "near", "refresh"):
            timed = [job for job in own if job["operator"] == operator and "seconds" in job]
            for job in sorted(timed, key=lambda job: job["seconds"]):
                seconds = job["seconds"]
                heads = 1 if job["dry"] else 32
                rate = 4 * width * heads * pairs[operator] / seconds / 1e12
                ratio = f"ratio {seconds / job['full']:.3f}" if "full" in job else job.get("kernel", "")
                numbers = f"{seconds * 1e6:9.1f} us {rate:6.1f} TF  error {job['error']:.1e}"
                lines.append(f"{numbers}  {_name(job)}  {ratio}")
        lines += [f"FAILED {_name(job)}: {job['failure']}" for job in own if "failure" in job]
    return "\n".join(lines)


def _pairs(tokens: int, window: int) -> int:
    return tokens * (2 * window + 1) - window * (window + 1)


if __name__ == "__main__":
    main()
