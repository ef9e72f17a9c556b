"""A plan as a figure, and what its provenance says of its calibration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from difa_fx import cli
from difa_fx.errors import OptionError, PlanFileError
from difa_fx.findings import calibration_of, first_admitting_threshold, summary
from difa_fx.plan import Method, Plan
from difa_fx.report import COLOURS, figure_of, plot_plan

SITES = ("blocks.0.attn", "blocks.1.attn")


def plan_with(
    calibration: Any = None, rows: Any = (("full", "full"), ("cached", "window"), ("full", "cached"))
) -> Plan:
    provenance = {} if calibration is None else {"calibration": calibration}
    return Plan(steps=len(rows), sites=SITES, methods=rows, window=4, cfg=None, provenance=provenance)


FOUND = {
    "search": "greedy",
    "threshold": 0.4,
    "loss": "paper",
    "samples": 3,
    "losses": [[{}, {}], [{"cached": 0.1}, {"cached": 0.9, "window": 0.3}], [{"cached": 0.7}, {"cached": 0.2}]],
    "limits": [0.2, 0.4],
    "step_seconds": {"full": [1.0, 1.0, 1.0], "plan": [1.0, 0.4, 0.5]},
    "drift": [0.0, 0.1, 0.3],
    "measured": {"speed_up": 1.58, "drift": 0.25},
}


def panels(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_the_map_shows_every_cell() -> None:
    figure = figure_of(plan_with())
    (image,) = figure.axes[0].get_images()
    order = list(COLOURS)
    shown = [[order[int(code)] for code in row] for row in image.get_array()]
    assert shown == [list(row) for row in plan_with().methods]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["full 50%", "window 17%", "cached 33%"]
    assert "blocks.0.attn" in figure.axes[0].get_xlabel() and "blocks.1.attn" in figure.axes[0].get_xlabel()
    assert panels(figure) == []


def test_panels_appear_as_far_as_their_data_are_there() -> None:
    assert panels(figure_of(plan_with(FOUND))) == ["time of a step", "losses chosen", "drift of latents"]
    for gone, title in [("step_seconds", "time of a step"), ("losses", "losses chosen"), ("drift", "drift of latents")]:
        less = {key: value for key, value in FOUND.items() if key != gone}
        assert title not in panels(figure_of(plan_with(less)))
    assert panels(figure_of(plan_with(FOUND | {"drift": [0.0, "x", 0.1]}))) == ["time of a step", "losses chosen"]


def test_the_panels_draw_the_numbers() -> None:
    _, seconds, losses, drift = figure_of(plan_with(FOUND)).axes
    assert sorted(bar.get_width() for bar in seconds.patches) == [0.4, 0.5, 1.0, 1.0, 1.0, 1.0]
    largest, median = (
        line.get_xdata().tolist() if hasattr(line.get_xdata(), "tolist") else list(line.get_xdata())
        for line in losses.get_lines()
    )
    assert largest == [0.3, 0.2]  # step 1: cached 0.1 and window 0.3; step 2: full, and cached 0.2
    assert median == [pytest.approx(0.2), 0.2]
    assert list(drift.get_lines()[0].get_xdata()) == [0.0, 0.1, 0.3]


@pytest.mark.parametrize(("steps", "sites"), [(1, 1), (3, 60), (250, 1), (250, 60)])
def test_ticks_stay_readable(steps: int, sites: int) -> None:
    figure = figure_of(Plan.uniform([f"b.{i}" for i in range(sites)], steps=steps, every=3))
    width, height = figure.get_size_inches()
    axes = figure.axes[0]
    assert width < 12 and height < 10
    assert 1 <= len(axes.get_xticks()) <= 30 and 1 <= len(axes.get_yticks()) <= 40
    assert axes.get_xticks()[0] == 0 and axes.get_yticks()[0] == 0


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_equal_plans_give_equal_files(kind: str, tmp_path: Path) -> None:
    first = plot_plan(plan_with(FOUND), tmp_path / f"a.{kind}").read_bytes()
    assert first == plot_plan(plan_with(FOUND), tmp_path / f"b.{kind}").read_bytes()
    assert len(first) > 1000


def test_a_figure_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.png"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(PlanFileError, match="No space left"):
        plot_plan(plan_with(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OptionError, match="of this kind"):
        plot_plan(plan_with(), tmp_path / "plan.jpeg")


@pytest.mark.parametrize("odd", [None, 3, [], "text", {"losses": 3}, {"losses": [[1]], "limits": "x", "drift": {}}])
def test_provenance_is_not_believed(odd: Any) -> None:
    plan = plan_with(odd)
    found = calibration_of(plan)
    assert found is None or (found.losses is None and found.limits is None and found.drift is None)
    assert summary(plan)
    assert panels(figure_of(plan)) == []


def test_the_summary_tells_the_gain() -> None:
    text = summary(plan_with(FOUND))
    assert "full 3 (50%)" in text
    assert "greedy search, threshold 0.4, paper loss, 3 samples" in text
    assert "measured: 1.58x" in text and "25.0% away" in text
    assert first_admitting_threshold(plan_with(FOUND)) is None  # something was admitted


def test_an_all_full_plan_says_what_stood_in_the_way() -> None:
    plan = plan_with(FOUND, rows=[["full", "full"]] * 3)
    # site 0 of 2 takes a loss below half the threshold: 0.1 needs 0.2; site 1: 0.2 needs 0.2 at step 2; 0.3 needs 0.3
    threshold, step, site, method = first_admitting_threshold(plan) or (0.0, 0, "", "")
    assert threshold == pytest.approx(0.2)
    assert (step, site, method) in {(1, SITES[0], "cached"), (2, SITES[1], "cached")}
    text = summary(plan)
    assert "every cell is full" in text and "loss 0.1, limit 0.2" in text and "above 0.2" in text
    assert first_admitting_threshold(plan_with(FOUND | {"search": "budget"}, rows=[["full", "full"]] * 3)) is None


def test_show_draws_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_with(FOUND).save(tmp_path / "plan.json")
    assert cli.main(["show", str(tmp_path / "plan.json")]) == 0
    assert "measured: 1.58x" in capsys.readouterr().out
    assert cli.main(["show", str(tmp_path / "plan.json"), "-o", str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main(["show", str(tmp_path / "plan.json"), "-o", str(tmp_path / "plan.txt")]) == 1
    assert "OptionError" in capsys.readouterr().err


def test_colours_differ() -> None:
    assert set(COLOURS) == set(Method)
    assert len(set(COLOURS.values())) == len(Method)
