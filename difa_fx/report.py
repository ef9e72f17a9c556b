"""What a plan looks like and why it came out so, as a figure.

Only this module uses matplotlib, inside functions and without pyplot: no window, no backend, no
current figure, and the caller's rcParams as they were.  It imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from math import nan
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from difa_fx.errors import OptionError
from difa_fx.findings import Calibration, calibration_of
from difa_fx.plan import Method, Plan
from difa_fx.plan_io import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Hue is the kind of attention, a light tone a shared CFG half.  Blue and orange are told apart with
#: any colour blindness, and the five differ in lightness.
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

_STYLE: Final = {
    "axes.edgecolor": _MID,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 4,
    "axes.titlesize": 8,
    "font.size": 7,
    "legend.borderaxespad": 0,
    "legend.borderpad": 0,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.3,
    "legend.loc": "upper left",
    "lines.linewidth": 1,
    "pdf.fonttype": 42,  # text stays text
    "svg.hashsalt": "difa_fx",
    "text.parse_math": False,  # a name may hold dollar signs
} | {f"{axis}tick.{name}": value for axis in "xy" for name, value in (("labelsize", 7), ("major.size", 2.5))}

# Inches.  Axes are placed by hand, so that rows stay aligned and text has room at every size.
_LEFT, _RIGHT, _BOTTOM, _CELL, _GAP, _PANEL = 0.6, 0.25, 1.0, 0.17, 0.25, 1.45
_LEAST_WIDTH, _HEAD = 5.6, 0.75  # room for all five methods in one row; title, legend and the panels' titles


def plot_plan(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Draws the plan (see :func:`figure_of`) as .png, .svg or .pdf, as the suffix of ``path`` says.

    The file is replaced in one move, or left as it was.

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
    """A map of the methods and, on the same axis of steps, what the calibration knows of each step.

    That is time, losses of the chosen methods and drift, as far as ``provenance`` holds them.

    Raises:
        OptionError: matplotlib is not installed.
    """
    panels = _panels(plan)
    wide, high = min(max(_CELL * len(plan.sites), 2.2), 7.5), min(max(_CELL * plan.steps, 1.3), 6.8)
    width = max(_LEFT + wide + len(panels) * (_GAP + _PANEL) + _RIGHT, _LEAST_WIDTH)
    height = _BOTTOM + high + _HEAD
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height))
        box = (_LEFT / width, _BOTTOM / height, wide / width, high / height)
        cells = figure.add_axes(box)
        _draw_cells(cells, plan, wide, high)
        for number, draw in enumerate(panels):
            left = _LEFT + wide + _GAP + number * (_PANEL + _GAP)
            panel = figure.add_axes((left / width, box[1], _PANEL / width, box[3]), sharey=cells)
            draw(panel)
            _finish(panel, high)
        _head(figure, plan)
        return figure


@contextmanager
def _style() -> Iterator[None]:
    """This module's look, whatever the caller's rcParams are; they come back afterwards."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise OptionError(
            "figures need matplotlib, which is not installed",
            where="difa_fx.report",
            got=str(error),
            allowed="matplotlib 3.8 or newer",
            todo="pip install 'difa_fx[report]'",
        ) from error
    plain: dict[Any, Any] = {
        name: value for name, value in mpl.rcParamsDefault.items() if not name.startswith("backend")
    }
    with mpl.rc_context(plain | _STYLE):
        yield


def _head(figure: Figure, plan: Plan) -> None:
    """The title, and below it the legend of the methods with their shares."""
    from matplotlib.patches import Patch

    width, height = figure.get_size_inches()
    sites = len(plan.sites)
    size = f": {plan.steps} steps \N{MULTIPLICATION SIGN} {sites} sites, window \N{PLUS-MINUS SIGN}{plan.window}"
    title = _plain(plan.denoiser or "any denoiser", int((width - _LEFT) / 0.085) - len(size)) + size
    figure.text(_LEFT / width, 1 - 0.1 / height, title, va="top", fontsize=9, fontweight="bold")
    shares = {method: _percent(count, plan.steps * sites) for method, count in plan.counts().items() if count}
    patches = [
        Patch(fc=COLOURS[method], ec=_MID, lw=0.4, label=f"{method} {share}") for method, share in shares.items()
    ]
    place = (_LEFT / width, 1 - 0.33 / height)
    figure.legend(handles=patches, bbox_to_anchor=place, ncols=len(patches), handleheight=0.9, columnspacing=1.4)


def _draw_cells(axes: Axes, plan: Plan, wide: float, high: float) -> None:
    """The map: a column a layer, a row a step, from the top down."""
    from matplotlib.colors import ListedColormap

    order, last = list(COLOURS), len(plan.sites) - 1
    codes = [[order.index(method) for method in row] for row in plan.methods]
    colours = ListedColormap(list(COLOURS.values()))
    axes.imshow(codes, cmap=colours, vmin=-0.5, vmax=len(order) - 0.5, aspect="auto", interpolation="nearest")
    lines = min(wide / len(plan.sites), high / plan.steps) > 0.06  # between smaller cells they would be in the way
    for axis, count, inches, label in (
        (axes.xaxis, last + 1, wide, 0.07 * len(str(last)) + 0.08),
        (axes.yaxis, plan.steps, high, 0.15),
    ):
        axis.set_ticks(_ticks(count, inches, label))
        if lines:
            axis.set_ticks([edge + 0.5 for edge in range(count - 1)], minor=True)
            axis.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    paths = [f"{site} = {_plain(plan.sites[site], int(wide / 0.062) - 5)}" for site in sorted({0, last})]
    axes.set_xlabel("\n".join(["layer", *paths]), loc="left", multialignment="left")
    axes.set_ylabel("step")


def _ticks(count: int, inches: float, label: float) -> range:
    """Every 1st, 2nd, 5th, 10th ...: as close as labels of that size allow."""
    strides = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    return range(0, count, next(stride for stride in strides if count * label <= inches * stride))


def _panels(plan: Plan) -> list[Callable[[Axes], None]]:
    """What draws each thing that the calibration knows, in order."""
    if (known := calibration_of(plan)) is None:
        return []
    found: list[Callable[[Axes], None]] = []
    if known.full_seconds and known.plan_seconds:
        found.append(partial(_draw_times, known.full_seconds, known.plan_seconds))
    chosen = [
        [losses[method] for losses, method in zip(row, methods, strict=True) if method in losses]
        for row, methods in zip(known.losses or (), plan.methods, strict=False)
    ]
    if any(chosen):
        found.append(partial(_draw_losses, chosen, known))
    if known.drift:
        found.append(partial(_draw_drift, known.drift))
    return found


def _draw_times(full: Sequence[float], plan: Sequence[float], axes: Axes) -> None:
    scale, unit = (1.0, "s") if max(*full, *plan) >= 1 else (1e3, "ms")
    heights = (0.8, 0.4) if len(full) <= 80 else (1.0, 1.0)  # gaps between thin bars would shimmer
    for name, times, colour, height in zip(("full", "plan"), (full, plan), (_PALE, _DARK), heights, strict=True):
        label = f"{name}, {sum(times):.3g} s in all"
        axes.barh(range(len(times)), [time * scale for time in times], height, color=colour, label=label)
    axes.set(title="time per step", xlabel=unit)


def _draw_losses(chosen: Sequence[Sequence[float]], known: Calibration, axes: Axes) -> None:
    if known.limits:
        axes.axvspan(min(known.limits), max(known.limits), color="#eeeeee", linewidth=0.8, label="limits of the layers")
    _line(axes, [max(losses, default=nan) for losses in chosen], "-", color=_DARK, label="largest")
    _line(axes, [median(losses) if losses else nan for losses in chosen], "--", color=_MID, label="median")
    axes.set(title="loss of chosen methods", xlabel=f"{known.loss} loss" if known.loss else "loss")


def _draw_drift(drift: Sequence[float], axes: Axes) -> None:
    _line(axes, drift, "-", color=_DARK, label=f"{drift[-1]:.3g} at the end")
    axes.set(title="drift of the latents", xlabel="relative L2 distance")


def _line(axes: Axes, values: Sequence[float], style: str, *, color: str, label: str) -> None:
    size = min(3.0, max(0.8, 60 / len(values)))
    axes.plot(values, range(len(values)), f"o{style}", color=color, label=label, markersize=size, clip_on=False)


def _finish(axes: Axes, high: float) -> None:
    """What all panels share: the look, and the legend below."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    axes.tick_params(axis="y", which="both", left=False, labelleft=False)
    axes.legend(bbox_to_anchor=(0, -0.42 / high))


def _percent(count: int, total: int) -> str:
    return "<1%" if 0 < count < total / 200 else f"{count / total:.0%}"


def _plain(text: str, room: int) -> str:
    """``text`` in letters that every font has, its middle left out where it is longer than ``room``."""
    shown = text if text.isascii() and text.isprintable() else ascii(text)[1:-1]
    half = (room - 1) // 2
    return shown if len(shown) <= room else f"{shown[:half]}\N{HORIZONTAL ELLIPSIS}{shown[-half:]}"
