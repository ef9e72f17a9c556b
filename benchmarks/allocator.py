"""What glibc's allocator costs on a CPU: Inductor and difa_fx with it as it is, and with one that keeps its memory.

    python benchmarks/allocator.py -o benchmarks/results/allocator

glibc asks the system for every block of more than 32 MiB and gives it back when it is freed; each page of the next one
costs a fault.  ``KEPT`` turns that off.  Processes with and without it take turns; in each, plain Inductor and a plan
of ``full`` alone take turns at a step of DiT-XL/2-512.  Times are the least of all rounds: a fault costs the same each
time, and whatever else the machine does only adds to it.  Writes ``.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from difa_fx.bench.settings import Size
from difa_fx.bench.shapes import make_subject
from difa_fx.bench.timing import Contender, interleaved
from difa_fx.hardware import hardware
from difa_fx.plan import Plan

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**32)}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="path of the results, without a suffix")
    parser.add_argument("--tokens", type=int, nargs="+", default=(1024, 4096))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12, help="in each process")
    parser.add_argument("--processes", type=int, default=2, help="of each kind")
    parser.add_argument("--tiny", action="store_true", help="very narrow, for tests")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(_measure(options)))
        return []
    rows = [row for tokens in options.tokens for row in _in_turn(tokens, options)]
    table = _table(rows)
    print(table)
    if options.output:
        settings = {name: value for name, value in vars(options).items() if name not in ("output", "child")}
        record = {"hardware": hardware(), "settings": settings, "kept": KEPT, "rows": rows}
        options.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(table, encoding="utf-8")
    return rows


def _in_turn(tokens: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What processes of both kinds measured at one length; the second kind's times as ratios to the first's, too."""
    found: dict[str, list[dict[str, Any]]] = {"as it is": [], "keeps memory": []}
    for number in range(options.processes):
        for name in [*found][:: 1 if number % 2 == 0 else -1]:
            found[name].append(_child(tokens, KEPT if name == "keeps memory" else {}, options))
    rows = []
    for name, made in found.items():
        seconds = {key: min(s for one in made for s in one["seconds"][key]) for key in ("inductor", "difa")}
        rows.append(
            {
                "allocator": name,
                "tokens": tokens,
                "seconds": seconds,
                "ratio": seconds["difa"] / seconds["inductor"],
                "faults": {key: statistics.median(one["faults"][key] for one in made) for key in seconds},
            }
        )
    for row in rows:
        row["to as it is"] = {key: row["seconds"][key] / rows[0]["seconds"][key] for key in row["seconds"]}
    return rows


def _child(tokens: int, environment: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    sizes = ("--tokens", str(tokens), "--layers", str(options.layers), "--rounds", str(options.rounds))
    command = [sys.executable, __file__, "--child", *sizes, *(["--tiny"] if options.tiny else [])]
    inherited = {name: value for name, value in os.environ.items() if name not in KEPT}
    done = subprocess.run(command, env=inherited | environment, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of steps that take turns, and pages that one step faults in."""
    (tokens,) = options.tokens
    subject = make_subject(Size(shape="dit-xl-2-512", layers=options.layers, tokens=tokens, tiny=options.tiny))
    plan = Plan.full(subject.sites, steps=1)
    inputs = subject.arguments(subject.noise, 500)
    with torch.no_grad():
        steps: dict[str, Callable[[], Any]] = {
            "inductor": partial(torch.compile(subject.model, backend="inductor"), **inputs),
            "difa": partial(torch.compile(subject.model, backend="difa", options={"plan": plan}), **inputs),
        }
        contenders = [Contender(name, step) for name, step in steps.items()]
        seconds = interleaved(contenders, rounds=options.rounds, warmup=2, cuda=False)
        return {"seconds": seconds, "faults": {name: _faults(step) for name, step in steps.items()}}


def _faults(step: Callable[[], Any]) -> int:
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = "| tokens | allocator | Inductor, ms | difa `full`, ms | difa / Inductor | Inductor, to as it is | faults |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for row in rows:
        times = f"{1000 * row['seconds']['inductor']:.0f} | {1000 * row['seconds']['difa']:.0f} | {row['ratio']:.3f}"
        faults = f"{row['faults']['inductor']:.0f} and {row['faults']['difa']:.0f}"
        against = f"{row['to as it is']['inductor']:.2f}"
        lines.append(f"| {row['tokens']} | {row['allocator']} | {times} | {against} | {faults} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
