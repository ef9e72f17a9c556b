"""A record as figures: one of speed-ups a case, and one of methods over tokens where a run has several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from difa_fx.bench.records import Bench, Case, Race, Row

_PLAIN = ("eager", "inductor", "max-autotune")


def draw(bench: Bench, output: Path) -> list[Path]:
    """Write the figures beside ``output``, a path without a suffix; gives their paths."""
    paths = []
    for number, case in enumerate(bench.cases):
        path = output.with_name(f"{output.name}-{number}-{case.size['shape']}.png")
        if _draw_case(case, path):
            paths.append(path)
    for shape in dict.fromkeys(str(case.size["shape"]) for case in bench.cases):
        path = output.with_name(f"{output.name}-tokens-{shape}.png")
        if _draw_tokens([case for case in bench.cases if case.size["shape"] == shape], path):
            paths.append(path)
    return paths


def _draw_case(case: Case, path: Path) -> bool:
    """Speed-ups over uncompressed Inductor with their ranges, and what the operations would allow."""
    races = (f"single steps, window +-{case.window}", case.methods), ("generations under the plan", case.generation)
    shown = {title: race for title, race in races if race is not None}
    if not shown:
        return False
    heights = [len(race.rows) for race in shown.values()]
    figure, axes = _subplots(len(shown), heights)
    for axis, (title, race) in zip(axes, shown.items(), strict=True):
        _bars(axis, race)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("speed-up over uncompressed Inductor")
    figure.suptitle(case.title, fontsize=10)
    _save(figure, path)
    return True


def _bars(axis: Any, race: Race) -> None:
    names = [row.label if len(row.label) < 30 else row.name for row in race.rows]
    middle = [row.speedup.median for row in race.rows]
    below = [row.speedup.median - row.speedup.least for row in race.rows]
    above = [row.speedup.largest - row.speedup.median for row in race.rows]
    axis.barh(names, middle, xerr=[below, above], color=[_color(row) for row in race.rows], ecolor="0.3")
    inductor = race.row("inductor").seconds.median
    for place, row in enumerate(race.rows):
        if row.ideal_seconds is not None and row.ideal_seconds > 0:
            axis.plot([inductor / row.ideal_seconds], [place], "k|", markersize=14)
    axis.axvline(1, color="0.3", linewidth=0.8)
    axis.invert_yaxis()


def _color(row: Row) -> str:
    if row.name in _PLAIN:
        return "0.7"
    return "tab:blue" if row.label.startswith("difa") else "tab:orange"


def _draw_tokens(cases: Sequence[Case], path: Path) -> bool:
    """Each method's share of the full step and its saving efficiency, over the image's tokens."""
    found = sorted(((case.size["tokens"], case.methods) for case in cases if case.methods), key=lambda pair: pair[0])
    if len({tokens for tokens, _ in found}) < 2:
        return False
    figure, (left, right) = _subplots(2, [8, 8], sideways=True)
    for name in dict.fromkeys(row.name for _, race in found for row in race.rows if row.label.startswith("difa")):
        points = [(tokens, race, row) for tokens, race in found for row in race.rows if row.name == name]
        tokens = [point[0] for point in points]
        share = [row.seconds.median / race.row("inductor").seconds.median for _, race, row in points]
        left.plot(tokens, share, "o-", label=name)
        known = [(tokens, row.efficiency.median) for tokens, _, row in points if row.efficiency is not None]
        if known:
            right.plot(*zip(*known, strict=True), "o-", label=name)
    left.set_ylabel("step, share of uncompressed Inductor's")
    right.set_ylabel("saving efficiency (full: uncompressed Inductor)")
    right.axhline(1, color="0.3", linewidth=0.8)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens")
        axis.legend(fontsize=8)
    _save(figure, path)
    return True


def _subplots(count: int, heights: Sequence[int], *, sideways: bool = False) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    if sideways:
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        return figure, figure.subplots(1, count)
    figure = Figure(figsize=(9, 1.5 * count + 0.35 * sum(heights)), layout="constrained")
    return figure, figure.subplots(count, 1, height_ratios=heights, squeeze=False)[:, 0]


def _save(figure: Any, path: Path) -> None:
    """Write the figure in one move."""
    draft = path.with_name(f".{path.name}.tmp")
    figure.savefig(draft, dpi=120, format="png")
    draft.replace(path)
