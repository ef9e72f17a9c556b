"""Kernels of window attention against full attention, in one run: what a window step and a refreshing step cost.

    python benchmarks/kernels.py -o benchmarks/results/kernels-cpu-2-cores

Every kernel that serves this device takes turns with ``scaled_dot_product_attention``.  A window is an eighth of the
tokens to either side, and its residual is added; ``refresh`` is full attention together with a new residual.  The
ideal is the share of (query, key) pairs in the window.  Kernels that are graphs (flex) are compiled by Inductor first.
Writes ``.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from difa_fx._torch import begin_lowering, fake_inputs, new_fake_mode, trace_aten
from difa_fx.attention import (
    WINDOW_KERNELS,
    choose_kernel,
    refresh_tensors,
    refreshed_attention,
    refreshes_at_once,
    window_attention,
    window_residual,
    window_tensors,
)
from difa_fx.bench.hardware import hardware
from difa_fx.bench.timing import Contender, interleaved, ratios
from difa_fx.cost import window_pairs
from difa_fx.errors import OptionError


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
    rows = []
    with torch.no_grad():
        for tokens in options.tokens:
            for width in options.head_dims:
                rows += _measure(tokens, width, options)
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    record = {"hardware": hardware(), "settings": settings, "rows": rows}
    options.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = _table(rows, record["hardware"], options)
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return rows


def _measure(tokens: int, width: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    shape = (options.batch, tokens, options.heads, width)
    q, k, v, residual = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    window = max(tokens // 8, 1)
    steps: dict[str, Callable[[], Any]] = {"full": lambda: scaled_dot_product_attention(q, k, v)}
    for kernel in options.kernels:
        steps |= _steps(kernel, q, k, v, residual, window)
    seconds = interleaved(
        [Contender(name, step) for name, step in steps.items()],
        rounds=options.rounds,
        warmup=2,
        cuda=device.type == "cuda",
        title=f"{tokens} tokens, width {width}",
        progress=True,
    )
    full = statistics.median(seconds["full"])
    flops = 4 * options.batch * options.heads * tokens**2 * width
    common = {"tokens": tokens, "head_dim": width, "window": window, "ideal": window_pairs(tokens, window) / tokens**2}
    common |= {"full_seconds": full, "full_flops_per_second": flops / full}
    rows = []
    for name in list(steps)[1:]:
        found = ratios(seconds[name], seconds["full"])
        rows.append(
            {"step": name, **common, "ratio": statistics.median(found), "least": min(found), "largest": max(found)}
        )
    return rows


def _steps(kernel: str, q: Tensor, k: Tensor, v: Tensor, residual: Tensor, window: int) -> dict[str, Callable[[], Any]]:
    """A window step and a refreshing step by ``kernel``; nothing where it cannot run."""
    shape: dict[str, Any] = {"grid": (q.shape[2],), "size": (window,), "text": (0, 0)}
    like = torch.empty(0, dtype=q.dtype, device=q.device)
    try:
        if choose_kernel(kernel, like=like, masked=False, **shape) != kernel:
            return {}
    except OptionError:
        return {}
    tensors = window_tensors(kernel, like=like, **shape)  # type: ignore[arg-type]
    settings: dict[str, Any] = shape | {"kernel": kernel}

    def near(q: Tensor, k: Tensor, v: Tensor, residual: Tensor) -> Tensor:
        return window_attention(q, k, v, None, *tensors, residual_BNHD=residual, **settings)

    def twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        full = scaled_dot_product_attention(q, k, v)
        return full, window_residual(full, q, k, v, None, *tensors, **settings)

    def at_once(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        lists = refresh_tensors(kernel, like=like, **shape)  # type: ignore[arg-type]
        return refreshed_attention(q, k, v, *lists, **settings)

    refresh = at_once if refreshes_at_once(kernel, like=like) else twice  # type: ignore[arg-type]
    if kernel == "flex":
        return {"flex": _compiled(near, q, k, v, residual), "flex, refresh": _compiled(refresh, q, k, v)}
    return {kernel: lambda: near(q, k, v, residual), f"{kernel}, refresh": lambda: refresh(q, k, v)}


def _compiled(step: Callable[..., Any], *inputs: Tensor) -> Callable[[], Any]:
    """``step`` as Inductor compiles it in a piece."""
    fakes = fake_inputs(inputs, new_fake_mode())

    class Step(torch.nn.Module):
        def forward(self, *values: Tensor) -> Any:
            out = step(*values)
            return out if isinstance(out, tuple) else (out,)

    graph = trace_aten(Step(), fakes)  # type: ignore[arg-type]
    run = begin_lowering(graph, fakes, {"epilogue_fusion": inputs[0].is_cuda})()
    return lambda: run(list(inputs))


def _table(rows: Sequence[dict[str, Any]], machine: dict[str, Any], options: argparse.Namespace) -> str:
    device = machine["gpu"] if options.device.startswith("cuda") else f"{machine['cpu']}, {machine['threads']} threads"
    title = f"{device}, torch {machine['torch']}, {options.dtype}, batch {options.batch}, {options.heads} heads."
    told = "Time over that of full attention: median (least - largest) of rounds in which all took turns."
    head = "| tokens | head width | window | step | ideal | time / full | full, GFLOP/s |"
    lines = [f"{title} {told}", "", head, "|---|---|---|---|---|---|---|"]
    for row in rows:
        ideal = 1.0 if row["step"].endswith("refresh") else row["ideal"]
        measured = f"{row['ratio']:.3f} ({row['least']:.3f} - {row['largest']:.3f})"
        size = f"{row['tokens']} | {row['head_dim']} | {row['window']}"
        lines.append(
            f"| {size} | {row['step']} | {ideal:.3f} | {measured} | {row['full_flops_per_second'] / 1e9:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
