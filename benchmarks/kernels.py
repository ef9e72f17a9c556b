"""Kernels of window attention against full attention, in one run: what a window step and a refreshing step cost.

    python benchmarks/kernels.py -o benchmarks/results/kernels-cpu-2-cores

Every kernel that serves this device takes turns with ``scaled_dot_product_attention``.  A window is an eighth of the
tokens to either side, and its residual is added; ``refresh`` is full attention together with a new residual.  The
ideal is the share of (query, key) pairs in the window.  Kernels that are graphs (flex) are compiled by Inductor first.
On CUDA each is a CUDA graph of some runs, so that launches do not count; what the host takes for them is ``host us``.

The ceiling is what a large matrix product reaches on the same device in the same process, and the rate of a kernel
counts the operations of the pairs in the window alone.  ``error`` is the relative L1 distance of a window step with a
fresh residual to full attention.  A kernel that fails is named with the reason.  Writes ``.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from difa_fx.attention import WINDOW_KERNELS
from difa_fx.bench.sampling import relative_l1
from difa_fx.bench.timing import Contender, interleaved, ratios
from difa_fx.cost import window_pairs
from difa_fx.device_time import recorded, timed
from difa_fx.hardware import hardware, machine_line
from difa_fx.kernel_race import possible_kernels, step_of

LONG_ENOUGH = 2e-3
"""Seconds that a timed CUDA graph takes at least, about."""


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure each size, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="path of the results, without a suffix")
    parser.add_argument("--tokens", type=int, nargs="+", default=(1024, 4096))
    parser.add_argument("--head-dims", type=int, nargs="+", default=(64, 72))
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kernels", nargs="+", choices=WINDOW_KERNELS[1:], default=WINDOW_KERNELS[1:])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    with torch.no_grad():
        record = {"hardware": hardware(), "settings": settings, "ceilings": _ceilings(options)}
        for tokens in options.tokens:
            for width in options.head_dims:
                rows += _measure(tokens, width, options, record["ceilings"], failed)
                _write(record | {"rows": rows, "failed": failed}, options)
    print(_table(record | {"rows": rows, "failed": failed}, options))
    return rows


def _ceilings(options: argparse.Namespace) -> dict[str, float]:
    """Operations a second of a large matrix product, and bytes a second, read and written, of a copy."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = interleaved(
        [Contender("product", lambda: left @ right), Contender("copy", lambda: target.copy_(source))],
        rounds=10,
        warmup=3,
        cuda=device.type == "cuda",
    )
    return {
        "flops_per_second": 2 * side**3 / min(seconds["product"]),
        "bytes_per_second": 2 * source.numel() / min(seconds["copy"]),
    }


def _measure(
    tokens: int, width: int, options: argparse.Namespace, ceilings: dict[str, float], failed: dict[str, str]
) -> list[dict[str, Any]]:
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    shape = (options.batch, tokens, options.heads, width)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(3))
    window = max(tokens // 8, 1)
    pairs = {"full": tokens**2}
    steps: dict[str, Callable[[], Any]] = {"full": lambda: scaled_dot_product_attention(q, k, v)}
    errors: dict[str, float | None] = {}
    site: dict[str, Any] = {"grid": (tokens,), "size": (window,), "text": (0, 0)}
    for name in possible_kernels(like=torch.empty(0, dtype=dtype, device=device), **site):
        if name not in options.kernels:
            continue
        try:
            refresh = step_of(name, (q, k, v, q), refresh=True, **site)
            near = step_of(name, (q, k, v, refresh()[1]), refresh=False, **site)
            errors[name] = relative_l1(near()[0], steps["full"]())
        except Exception as error:  # noqa: BLE001  one kernel's failure must not cost the others' numbers
            failed[f"{name}, {tokens} tokens, width {width}"] = f"{type(error).__name__}: {error}"[:2000]
            continue
        steps |= {name: near, f"{name}, refresh": refresh}
        pairs |= {name: window_pairs(tokens, window), f"{name}, refresh": tokens**2}
    seconds = _seconds(steps, device.type == "cuda", options, f"{tokens} tokens, width {width}")
    rows = []
    for name, found in seconds.items():
        ratio, median = ratios(found, seconds["full"]), statistics.median(found)
        rate = 4 * options.batch * options.heads * pairs[name] * width / median
        rows.append(
            {
                "step": name,
                "tokens": tokens,
                "head_dim": width,
                "window": window,
                "ideal": pairs[name] / tokens**2,
                "seconds": median,
                "ratio": statistics.median(ratio),
                "least": min(ratio),
                "largest": max(ratio),
                "flops_per_second": rate,
                "share_of_ceiling": rate / ceilings["flops_per_second"],
                "error": errors.get(name),
                "host_seconds": _host_seconds(steps[name]) if device.type == "cuda" else None,
            }
        )
    return rows


def _seconds(
    steps: dict[str, Callable[[], Any]], cuda: bool, options: argparse.Namespace, title: str
) -> dict[str, list[float]]:
    """Seconds of one run of each step, a number a round."""
    times = 1
    if cuda:
        steps["full"]()
        times = min(20, math.ceil(LONG_ENOUGH / timed(steps["full"], cuda)))
    found = interleaved(
        [Contender(name, recorded(step, times=times) if cuda else step) for name, step in steps.items()],
        rounds=options.rounds,
        warmup=2,
        cuda=cuda,
        title=title,
        progress=True,
    )
    return {name: [value / times for value in values] for name, values in found.items()}


def _host_seconds(step: Callable[[], Any]) -> float:
    """Median seconds that the host takes to launch a run of ``step``."""
    launch = Contender("launch", step, prepare=torch.cuda.synchronize)
    return statistics.median(interleaved([launch], rounds=50, warmup=0, cuda=False)["launch"])


def _write(record: dict[str, Any], options: argparse.Namespace) -> None:
    options.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(_table(record, options), encoding="utf-8")


def _table(record: dict[str, Any], options: argparse.Namespace) -> str:
    machine, ceilings = record["hardware"], record["ceilings"]
    device = machine["gpu"] if options.device.startswith("cuda") else machine_line(machine)
    title = f"{device}, torch {machine['torch']}, {options.dtype}, batch {options.batch}, {options.heads} heads."
    told = "Time over that of full attention: median (least - largest) of rounds in which all took turns."
    most = (
        f"Ceiling: a large matrix product runs at {ceilings['flops_per_second'] / 1e12:.4g} TFLOP/s, a copy at "
        f"{ceilings['bytes_per_second'] / 1e9:.4g} GB/s."
    )
    head = "| tokens | head width | window | step | ideal | time / full | ms | TFLOP/s | of ceiling | error | host us |"
    lines = [f"{title} {told} {most}", "", head, "|" + "---|" * head.count(" |")]
    for row in record["rows"]:
        measured = f"{row['ratio']:.3f} ({row['least']:.3f} - {row['largest']:.3f})"
        size = f"{row['tokens']} | {row['head_dim']} | {row['window']}"
        rate = f"{row['flops_per_second'] / 1e12:.3g} | {row['share_of_ceiling']:.0%}"
        error = "" if row["error"] is None else f"{row['error']:.1g}"
        host = "" if row.get("host_seconds") is None else f"{1e6 * row['host_seconds']:.3g}"
        told = f"{row['ideal']:.3f} | {measured} | {1000 * row['seconds']:.4g} | {rate} | {error} | {host}"
        lines.append(f"| {size} | {row['step']} | {told} |")
    lines += [""] * bool(record["failed"]) + [f"- {name} failed: {why}" for name, why in record["failed"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
