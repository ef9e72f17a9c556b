"""What a plan looks like and why it came out so, as a figure.

Only this module uses matplotlib, inside functions and without pyplot: no window, no backend, no
current figure, and the caller's rcParams as they were.  It imports no torch.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from difa_fx.errors import OptionError
from difa_fx.findings import Calibration, calibration_of
from difa_fx.plan import Method, Plan
from difa_fx.plan_io import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Hue is the kind of attention and a light tone a shared CFG half; blue and orange are told apart
#: with any colour blindness, and the five differ in lightness where there is no colour at all.
COLOURS: Final[Mapping[Method, str]] = {
    Method.FULL: "#1b4f8a",
    Method.WINDOW: "#d9731a",
    Method.CACHED: "#ececec",
    Method.FULL_CFG: "#86b6e3",
    Method.WINDOW_CFG: "#f8cd94",
}
_DARK, _MID, _PALE = "#333333", "#8a8a8a", "#d6d6d6"

#: Suffix -> the metadata that keeps the date out, so that equal plans give equal files.
_FORMATS: Final[Mapping[str, dict[str, None]]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}

_STYLE: Final[dict[Any, Any]] = {
    "axes.edgecolor": _MID,
    "axes.linewidth": 0.6,
    "axes.titlesize": 8,
    "font.size": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "difa_fx",
    "xtick.labelsize": 7,
    "xtick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.labelsize": 7,
    "ytick.major.size": 2.5,
    "ytick.major.width": 0.6,
}

# Inches.  Axes are placed by hand, so that rows stay aligned and text has room at every size.
_LEFT, _RIGHT, _BOTTOM, _CELL, _GAP, _PANEL = 0.6, 0.25, 1.0, 0.17, 0.22, 1.45
_LEGEND_ENTRY, _LEGEND_ROW = 1.12, 0.18


def plot_plan(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Draws the plan to a file: see :func:`figure_of`.  The file is replaced in one move, or left as it was.

    Args:
        plan: the plan, with or without data of its calibration.
        path: where the figure goes; the suffix says as what: .png, .svg or .pdf.

    Raises:
        OptionError: the suffix is another one, or matplotlib is not installed.
        PlanFileError: the file cannot be written.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in _FORMATS:
        raise OptionError(
            "a figure of this kind cannot be written",
            where=os.fspath(path),
            got=Path(path).suffix or "no suffix",
            allowed=[f".{name}" for name in _FORMATS],
            todo="end the file's name in one of those",
        )
    image = BytesIO()
    with _style():
        figure_of(plan).savefig(image, format=kind, dpi=200, metadata=_FORMATS[kind])
    write_bytes(path, image.getvalue())
    return Path(path)


def figure_of(plan: Plan) -> Figure:
    """The figure: a map of the methods, and beside each row what the calibration knows of the step.

    The panels after the map are there as far as ``provenance`` holds their data: time per step, losses
    of the chosen methods, drift.  They share the map's axis of steps.

    Raises:
        OptionError: matplotlib is not installed.
    """
    with _style():
        from matplotlib.figure import Figure

        panels = _panels(plan)
        wide = min(max(_CELL * len(plan.sites), 2.2), 7.5)
        high = min(max(_CELL * plan.steps, 1.3), 6.8)
        width = max(_LEFT + wide + len(panels) * (_GAP + _PANEL) + _RIGHT, 5.2)
        per_row = int((width - _LEFT) / _LEGEND_ENTRY)
        used = [method for method, count in plan.counts().items() if count]
        rows = -(-len(used) // per_row)
        height = _BOTTOM + high + 0.6 + rows * _LEGEND_ROW
        figure = Figure(figsize=(width, height))

        def place(x: float, w: float, share: Axes | None = None) -> Axes:
            return figure.add_axes((x / width, _BOTTOM / height, w / width, high / height), sharey=share)

        cells = place(_LEFT, wide)
        _draw_cells(cells, plan, wide, high)
        for number, draw in enumerate(panels):
            panel = place(_LEFT + wide + _GAP + number * (_PANEL + _GAP), _PANEL, cells)
            _prepare(panel)
            draw(panel)
            if panel.get_legend_handles_labels()[0]:
                _legend_below(panel, high)
        _head(figure, plan, used, per_row)
        return figure


@contextmanager
def _style() -> Iterator[None]:
    """Within, matplotlib draws in this module's style.

    Raises:
        OptionError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise OptionError(
            "matplotlib is not installed", where="report", got=str(error), todo="pip install 'difa_fx[report]'"
        ) from error
    with rc_context(_STYLE):
        yield


def _panels(plan: Plan) -> list[Callable[[Axes], None]]:
    """What to draw beside the map: as far as the provenance holds it."""
    found = calibration_of(plan)
    if found is None:
        return []
    panels: list[Callable[[Axes], None]] = []
    if found.plan_seconds is not None and found.full_seconds is not None:
        panels.append(partial(_draw_seconds, full=found.full_seconds, plan=found.plan_seconds))
    if _chosen_losses(plan, found):
        panels.append(partial(_draw_losses, chosen=_chosen_losses(plan, found), limits=found.limits))
    if found.drift is not None:
        panels.append(partial(_draw_drift, drift=found.drift))
    return panels


def _chosen_losses(plan: Plan, found: Calibration) -> dict[int, list[float]]:
    """Step to the losses of the methods that were chosen there; full attention has none."""
    steps = enumerate(zip(plan.methods, found.losses or (), strict=False))
    losses = {t: [tried[m.value] for m, tried in zip(*pair, strict=False) if m.value in tried] for t, pair in steps}
    return {step: values for step, values in losses.items() if values}


def _draw_cells(axes: Axes, plan: Plan, wide: float, high: float) -> None:
    """The map: a column a site, a row a step, a colour a method."""
    from matplotlib.colors import ListedColormap

    order = list(COLOURS)
    codes = [[order.index(method) for method in row] for row in plan.methods]
    axes.imshow(
        codes,
        cmap=ListedColormap(list(COLOURS.values())),
        vmin=-0.5,
        vmax=len(order) - 0.5,
        aspect="auto",
        interpolation="nearest",
    )
    sites, steps = len(plan.sites), plan.steps
    if wide / sites > 0.08 and high / steps > 0.08:
        axes.set_xticks([i - 0.5 for i in range(1, sites)], minor=True)
        axes.set_yticks([i - 0.5 for i in range(1, steps)], minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
    axes.set_xticks(_ticks(sites, int(wide / 0.28)))
    axes.set_yticks(_ticks(steps, int(high / 0.2)))
    axes.set_ylabel("step")
    first, last = plan.sites[0], plan.sites[-1]
    axes.set_xlabel(f"site\n0: {first}" + (f"\n{sites - 1}: {last}" if sites > 1 else ""), loc="left")


def _ticks(count: int, room: int) -> list[int]:
    """At most ``room`` round positions among ``count``, the first one among them."""
    for step in (1, 2, 5, 10, 20, 25, 50, 100, 200, 500):
        if count <= step * max(room, 2):
            return list(range(0, count, step))
    return [0, count - 1]


def _prepare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", which="both", labelleft=False, length=0)
    axes.grid(axis="x", color=_PALE, linewidth=0.5)
    axes.set_axisbelow(True)


def _draw_seconds(axes: Axes, full: Sequence[float], plan: Sequence[float]) -> None:
    steps = range(len(plan))
    axes.barh(steps, full, height=0.9, color=_PALE, label="full")
    axes.barh(steps, plan, height=0.55, color=COLOURS[Method.FULL], label="plan")
    axes.set_title("time of a step")
    axes.set_xlabel("s")
    axes.set_xlim(left=0)


def _draw_losses(axes: Axes, chosen: Mapping[int, Sequence[float]], limits: Sequence[float] | None) -> None:
    steps = list(chosen)
    if limits:
        axes.axvspan(min(limits), max(limits), color=_PALE, alpha=0.6, linewidth=0, label="limits")
    axes.plot([max(chosen[t]) for t in steps], steps, ".", color=COLOURS[Method.WINDOW], markersize=5, label="largest")
    medians = [statistics.median(chosen[t]) for t in steps]
    axes.plot(medians, steps, ".", color=COLOURS[Method.FULL], markersize=5, label="median")
    axes.set_title("losses chosen")
    axes.set_xlabel("loss")
    axes.set_xlim(left=0)


def _draw_drift(axes: Axes, drift: Sequence[float]) -> None:
    axes.plot(drift, range(len(drift)), color=_DARK, linewidth=1.2)
    axes.set_title("drift of latents")
    axes.set_xlabel("relative L2")
    axes.set_xlim(left=0)


def _legend_below(axes: Axes, high: float) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.42 / high), ncols=1, handlelength=1.0, borderaxespad=0.0)


def _head(figure: Figure, plan: Plan, used: Sequence[Method], per_row: int) -> None:
    """The title, and a legend with each method's share of the cells."""
    from matplotlib.patches import Patch

    width, height = figure.get_size_inches()
    counts, cells = plan.counts(), plan.steps * len(plan.sites)
    handles: list[Any] = [Patch(facecolor=COLOURS[m], edgecolor=_MID, linewidth=0.4) for m in used]
    names = [f"{m} {counts[m] / cells:.0%}" for m in used]
    left = _LEFT / width
    title = f"{plan.denoiser or 'Plan'}: {plan.steps} steps x {len(plan.sites)} sites, window \u00b1{plan.window}"
    figure.text(left, 1 - 0.12 / height, title, va="top", fontsize=9)
    figure.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(left, 1 - 0.3 / height),
        ncols=max(1, min(per_row, len(used))),
        borderaxespad=0.0,
        handlelength=1.0,
        columnspacing=1.2,
    )
