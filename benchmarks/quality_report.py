"""What ``quality.py`` measured, as people read it: the table, what it shows, and the figure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

SERIES = ("inductor", "bundled", "threshold", "budget")
"""Where plans come from, in the order of the table."""

GOAL_SPEED_UP, GOAL_ACCURACY_LOST, GOAL_SSIM = 1.5, 0.01, 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way of generating, measured.

    Attributes:
        name: as the table shows it.
        series: where the plan comes from, one of ``SERIES``.
        setting: the threshold or budget.
        seconds: of one batch, median.
        inductor_seconds: of the same batches with plain Inductor, in turn.
        speed_up: Inductor's seconds over the plan's, median of the pairs.
        least_speed_up: of the pairs.
        largest_speed_up: of the pairs.
        pairs: how many.
        compile_seconds: the first batch less a later one, with empty caches.
        search_seconds: of calibration, with its compilation and its own measurements; budgets share one profile.
        flops_kept: fraction of the attention's operations, attention alone.
        flops_kept_with_projections: the same with the projections counted.
        state_bytes: most state held after a step.
        accuracy: share of digits that the classifier reads as the class asked for.
        frechet: Frechet distance to the real scans in the classifier's features.
        relative_l1: distance to the images of plain Inductor.
        psnr: peak signal-to-noise ratio to them, dB; None where they are equal.
        ssim: structural similarity to them.
        predicted_speed_up: what the search expected.
        calibrated_speed_up: what the search measured.
    """

    name: str
    series: str
    setting: float | None
    seconds: float
    inductor_seconds: float
    speed_up: float
    least_speed_up: float
    largest_speed_up: float
    pairs: int
    compile_seconds: float
    search_seconds: float | None
    flops_kept: float
    flops_kept_with_projections: float
    state_bytes: int
    accuracy: float
    frechet: float
    relative_l1: float
    psnr: float | None
    ssim: float
    predicted_speed_up: float | None
    calibrated_speed_up: float | None


def order(row: Row) -> tuple[int, float]:
    """The place of a row in the table."""
    return SERIES.index(row.series), row.setting or 0.0


COLUMNS: dict[str, Callable[[Row], str]] = {
    "plan": lambda row: row.name,
    "speed-up (least - largest)": lambda row: (
        f"{row.speed_up:.2f} ({row.least_speed_up:.2f} - {row.largest_speed_up:.2f})"
    ),
    "s a batch": lambda row: f"{row.seconds:.2f}",
    "Inductor's s": lambda row: f"{row.inductor_seconds:.2f}",
    "attention FLOPs kept": lambda row: f"{row.flops_kept:.1%}",
    "with projections": lambda row: f"{row.flops_kept_with_projections:.1%}",
    "read right": lambda row: f"{row.accuracy:.1%}",
    "Frechet": lambda row: f"{row.frechet:.3f}",
    "relative L1": lambda row: f"{row.relative_l1:.4f}",
    "PSNR, dB": lambda row: _or_dash(row.psnr, ".1f"),
    "SSIM": lambda row: f"{row.ssim:.4f}",
    "compile s": lambda row: f"{row.compile_seconds:.1f}",
    "search s": lambda row: _or_dash(row.search_seconds, ".0f"),
    "speed-up predicted": lambda row: _or_dash(row.predicted_speed_up, ".2f"),
    "measured by the search": lambda row: _or_dash(row.calibrated_speed_up, ".2f"),
}


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def markdown(rows: Sequence[Row], record: dict[str, Any], name: str) -> str:
    """The table, what it shows, and how it was made."""
    machine, settings = record["hardware"], record["settings"]
    cells = [list(COLUMNS), ["---"] * len(COLUMNS), *([cell(row) for cell in COLUMNS.values()] for row in rows)]
    made = (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, difa_fx {record['version']}; "
        f"{settings['images']} digits in batches of {settings['batch']}, {settings['steps']} steps, "
        f"calibrated on {settings['samples']} others, window {settings['window']}, compiler {settings['compiler']}."
    )
    meaning = (
        f"Times are of batches that took turns with plain Inductor's, {settings['pairs']} a plan. Distances are to "
        "Inductor's images of the same noise, in these batches; the Frechet distance is to the real scans, in the "
        "classifier's features. As many of the real scans themselves are "
        f"{record['real_scans_frechet']:.3f} from all of them."
    )
    table = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    picture = f"![SSIM against speed-up, and FLOPs against the threshold]({name}.png)"
    return "\n\n".join([made, table, meaning, explain(rows), picture]) + "\n"


def explain(rows: Sequence[Row]) -> str:
    """Whether FLOPs fall as the threshold rises, with all exceptions, and which rows reach the goal."""
    steps = list(pairwise(sorted((row for row in rows if row.series == "threshold"), key=order)))
    counts = {"Attention FLOPs kept": "flops_kept", "With projections they": "flops_kept_with_projections"}
    lines = []
    for title, field in counts.items() if steps else ():
        rises = [
            f"{getattr(low, field):.1%} at {low.setting:g}, {getattr(high, field):.1%} at {high.setting:g}"
            for low, high in steps
            if getattr(high, field) > getattr(low, field)
        ]
        lines.append(f"{title} never rise with the threshold." if not rises else f"{title} rise: {'; '.join(rises)}.")
    return "\n\n".join([*lines, _goal(rows)])


def _goal(rows: Sequence[Row]) -> str:
    (plain,) = (row for row in rows if row.series == "inductor")
    least = plain.accuracy - GOAL_ACCURACY_LOST - 1e-9
    good = [row for row in rows if row is not plain and row.accuracy >= least and row.ssim >= GOAL_SSIM]
    reached = [f"{row.name} ({row.speed_up:.2f}x)" for row in good if row.speed_up >= GOAL_SPEED_UP]
    goal = (
        f"The goal, {GOAL_SPEED_UP:g}x over Inductor with at most {100 * GOAL_ACCURACY_LOST:g} point of accuracy lost "
        f"and SSIM of {GOAL_SSIM:g} or more, is reached by "
    )
    if reached:
        return f"{goal}{', '.join(reached)}."
    fastest = max(good, key=lambda row: row.speed_up, default=None)
    nearest = "none is as good as that" if fastest is None else f"{fastest.name} is {fastest.speed_up:.2f}x"
    return f"{goal}no row; of those as good as that, the fastest: {nearest}."


STYLE: dict[Any, Any] = {
    "font.size": 8,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "0.3",
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 5,
}
BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d9730d", "#2a8a57", "0.45"
"""Told apart in grey and by the colour-blind too, with the markers' help."""

SPOTS = ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))
"""Where a label may stand: to the right, above, and so on; the first that is as good as any other is taken."""

LOOKS: dict[str, dict[str, Any]] = {
    "inductor": {"label": "Inductor", "color": GREY, "marker": "o", "linestyle": "", "markerfacecolor": "white"},
    "threshold": {"label": "threshold", "color": BLUE, "marker": "o", "linestyle": "-"},
    "budget": {"label": "budget", "color": ORANGE, "marker": "s", "linestyle": "--"},
    "bundled": {"color": GREEN, "marker": "D", "linestyle": ""},
}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Save the figure: what quality a speed-up costs, and what a threshold does to FLOPs."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    thresholds = sorted((row for row in rows if row.series == "threshold"), key=order)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.0), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.08))
        left, *others = figure.subplots(1, 2 if thresholds else 1, squeeze=False)[0]
        _draw_trade(left, rows)
        for right in others:
            _draw_flops(right, thresholds)
        figure.draw_without_rendering()  # only now it is known where points are
        _label(left, [row for row in rows if row.setting is not None])
        figure.savefig(path, dpi=150)


def _draw_trade(axes: Any, rows: Sequence[Row]) -> None:
    """SSIM against speed-up, a point a row, with the goal's corner shaded."""
    for series, look in LOOKS.items():
        found = sorted((row for row in rows if row.series == series), key=order)
        if found:
            label = look.get("label", found[0].name)
            axes.plot([row.speed_up for row in found], [row.ssim for row in found], **(look | {"label": label}))
    axes.margins(0.1)
    lowest = min(axes.get_ylim()[0], 0.92)
    axes.set(xlim=(None, max(axes.get_xlim()[1], 1.65)), ylim=(lowest, 1 + 0.08 * (1 - lowest)))
    goal = {"color": "0.93", "zorder": 0, "linewidth": 0, "label": "goal"}
    axes.fill_between([GOAL_SPEED_UP, axes.get_xlim()[1]], GOAL_SSIM, 1, **goal)
    axes.set(xlabel="speed-up over Inductor, end to end", ylabel="SSIM to the uncompressed images")
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_title("(a) quality against time")
    axes.legend(loc="lower left")


def _label(axes: Any, rows: Sequence[Row]) -> None:
    """Write each row's setting beside its point, where it covers least of the points, lines and other labels."""
    taken = [spot for line in axes.lines for spot in _along(axes.transData.transform(line.get_xydata()))]
    taken += _along(axes.bbox.corners()[[0, 1, 3, 2, 0]])
    unit = axes.figure.dpi / 72
    for row in rows:
        text = f"{row.setting:g}" + ("x" if row.series == "budget" else "")
        x, y = axes.transData.transform((row.speed_up, row.ssim))
        wide, high = (2.2 * len(text) + 1) * unit, 4 * unit  # half of the label's
        spots = [(x + dx * (wide + 5 * unit), y + dy * (high + 5 * unit)) for dx, dy in SPOTS]
        _, best = min((_covered(taken, spot, (wide, high)), number) for number, spot in enumerate(spots))
        along, up = spots[best][0] - x, spots[best][1] - y
        axes.annotate(
            text,
            (row.speed_up, row.ssim),
            (along / unit, up / unit),
            textcoords="offset points",
            ha="center",
            va="center_baseline",
            fontsize=7,
            color=LOOKS[row.series]["color"],
        ).set_in_layout(False)
        taken += [(x + along + i * wide / 4, y + up + j * high) for i in range(-4, 5) for j in (-1, 0, 1)]


def _covered(taken: Sequence[tuple[float, float]], spot: tuple[float, float], half: tuple[float, float]) -> int:
    """How many of the pixels in use lie under a label around ``spot``."""
    return sum(abs(x - spot[0]) < half[0] and abs(y - spot[1]) < half[1] for x, y in taken)


def _along(points: Any) -> Iterator[tuple[float, float]]:
    """Points along a line, close together."""
    yield from points
    for (ax, ay), (bx, by) in pairwise(points):
        yield from ((ax + (bx - ax) * i / 40, ay + (by - ay) * i / 40) for i in range(1, 40))


def _draw_flops(axes: Any, rows: Sequence[Row]) -> None:
    """Attention FLOPs kept against the threshold, with and without projections."""
    look = {"color": BLUE, "clip_on": False}
    settings = [row.setting for row in rows]
    for label, marker, field in (
        ("attention alone", {"marker": "o"}, "flops_kept"),
        ("with projections", {"marker": "^", "linestyle": "--"}, "flops_kept_with_projections"),
    ):
        axes.plot(settings, [100 * getattr(row, field) for row in rows], label=label, **(look | marker))
    axes.set(ylim=(0, 100), xlabel="threshold", ylabel="attention FLOPs kept, %", xticks=settings)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title("(b) what a threshold keeps")
    axes.legend(loc="lower left")
