"""Windows over the grid of pixels against windows along the flattened sequence, at equal FLOPs, on the bundled digits.

    python benchmarks/windows.py -o benchmarks/results/windows

Every ``--every``-th step is full, and between them all sites see a window and the residual.  For each size of a
two-dimensional window the one-dimensional window with the nearest number of (query, key) pairs is taken.  What is
compared is the distance to the uncompressed images of the same noise; writes ``.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import difa_fx
from difa_fx.cost import window_pairs
from difa_fx.hardware import hardware
from difa_fx.plan import GridWindow, Plan, Window

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples")]

import digits  # noqa: E402

GRID = (32, 32)
TOKENS = GRID[0] * GRID[1]
SITES = [f"transformer_blocks.{layer}.attn1" for layer in range(6)]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Generate under every window, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="path of the results, without a suffix")
    parser.add_argument("--sizes", type=int, nargs="*", default=(2, 4, 6, 10), help="pixels to either side")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--steps", type=int, default=digits.STEPS)
    parser.add_argument("--every", type=int, default=4, help="distance between full steps")
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "aot_eager", "eager"))
    options = parser.parse_args(argv)
    windows: list[Window] = []
    for size in options.sizes:
        grid = GridWindow(GRID, (size, size))
        windows += [grid, equal_band(grid)]
    reference = _generate(None, options)
    rows = []
    for window in tqdm(windows, unit="window"):
        apart = digits.distances(_generate(window, options), reference)
        pairs = window_pairs(TOKENS, window)
        rows.append({"window": str(window), "axes": 1 if isinstance(window, int) else 2, "pairs": pairs, **apart})
    record = {"hardware": hardware(), "settings": vars(options) | {"output": None}, "rows": rows}
    options.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = _table(rows)
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return rows


def equal_band(grid: GridWindow) -> int:
    """The window along the sequence with the number of pairs nearest to that of ``grid``."""
    wanted = window_pairs(TOKENS, grid)
    return min(range(TOKENS), key=lambda window: abs(window_pairs(TOKENS, window) - wanted))


def _generate(window: Window | None, options: argparse.Namespace) -> Tensor:
    torch.compiler.reset()
    pipe = digits.load_pipeline()
    plan = Plan.full(SITES, steps=options.steps, cfg="cond_first")
    if window is not None:
        every = {"steps": options.steps, "every": options.every, "method": "window", "window": window}
        plan = Plan.uniform(SITES, cfg="cond_first", **every)
    difa_fx.attach(pipe, plan, compiler=options.compiler)
    labels = [i % digits.CLASSES for i in range(options.images)]
    return digits.generate(pipe, labels, seed=1, steps=options.steps)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| window | axes | share of full attention | relative L1 | PSNR | SSIM |", "|---|---|---|---|---|---|"]
    for row in rows:
        share = row["pairs"] / TOKENS**2
        measured = f"{row['relative_l1']:.4f} | {row['psnr']:.1f} | {row['ssim']:.4f}"
        lines.append(f"| {row['window']} | {row['axes']} | {share:.1%} | {measured} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
