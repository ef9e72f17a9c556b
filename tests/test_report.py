"""Reports: the figure shows the plan and its calibration, the text says why a plan came out as it did."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from difa_fx import cli
from difa_fx.errors import OptionError, PlanFileError
from difa_fx.findings import Calibration, calibration_of, first_admitting_threshold, summary
from difa_fx.plan import Method, Plan
from difa_fx.report import COLOURS, figure_of, plot_plan

REAL = Path(__file__).parent / "plans" / "dit-xl-2-512_20steps_t0.15.json"
ROWS = (("full", "full", "full"), ("cached", "window", "full"), ("window", "full", "full"))
DATA = {
    "search": "greedy",
    "threshold": 0.3,
    "loss": "paper",
    "candidates": ["cached", "window"],
    "samples": 8,
    "seed": 3,
    "losses": [
        [{}, {}, {}],
        [{"cached": 0.05}, {"cached": 0.4, "window": 0.15}, {"cached": 0.9, "window": 0.8}],
        [{"cached": 0.2, "window": 0.07}, {"cached": 0.5, "window": 0.6}, {}],
    ],
    "limits": [0.1, 0.2, 0.3],
    "step_seconds": {"full": [0.2, 0.21, 0.19], "plan": [0.2, 0.1, 0.15]},
    "drift": [0.0, 0.02, 0.035],
    "predicted": {"speed_up": 1.5, "flops_kept": 0.75},
    "measured": {"speed_up": 1.333, "drift": 0.036},
}
PANELS = {"step_seconds": "time per step", "losses": "loss of chosen methods", "drift": "drift of the latents"}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.sampled_from(list(Method)), inner),
    max_leaves=8,
)


def plan_of(data: object = None, **changes: object) -> Plan:
    """3 steps x 3 sites, with ``data`` as the calibration."""
    fields = {"methods": ROWS, "sites": ("blocks.0.attn", "blocks.1.attn", "blocks.2.attn"), "denoiser": "DiT"}
    provenance = {} if data is None else {"calibration": data}
    return Plan(**({"steps": 3, "window": 8, "cfg": None, "provenance": provenance} | fields | changes))


def stuck(**changes: object) -> Plan:
    """All ``full``: every loss is above its layer's limit."""
    losses = [
        [{}, {}, {}],
        [{"cached": 0.5, "window": 0.25}, {"cached": 0.4, "window": 0.31}, {"cached": 0.9, "window": 0.8}],
        [{"cached": 0.6, "window": 0.2}, {"cached": 0.5, "window": 0.6}, {"window": 0.7, "cached": 0.35}],
    ]
    return plan_of(DATA | {"losses": losses} | changes, methods=[["full"] * 3] * 3)


def mixed(steps: int, sites: int, *, calibrated: bool) -> Plan:
    """Every method as often as the others, in a plan of any size, under long names."""
    methods = itertools.cycle(Method)
    rows = [["full"] * sites, *([next(methods) for _ in range(sites)] for _ in range(steps - 1))]
    data = {
        "losses": [[{method.value: 0.1 * s + 0.01 for method in Method} for _ in range(sites)] for s in range(steps)],
        "limits": [0.3 * (i + 1) / sites for i in range(sites)],
        "step_seconds": {"full": [0.0123] * steps, "plan": [0.00713] * steps},
        "drift": [1e-6 * s for s in range(steps)],
    }
    return Plan(
        steps=steps,
        sites=[f"base_model.model.transformer.transformer_blocks.{i}.attention.attn1" for i in range(sites)],
        methods=rows,
        window=16384,
        cfg="cond_first",
        denoiser="AVeryLongNameOfAVideoTransformer3DModel",
        provenance={"calibration": data} if calibrated else {},
    )


def axes_by_title(figure: Figure) -> dict[str, object]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def texts(legend: object) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


# Reading the calibration


def test_calibration():
    known = calibration_of(plan_of(DATA))
    assert (known.search, known.threshold, known.loss, known.samples, known.seed) == ("greedy", 0.3, "paper", 8, 3)
    assert known.candidates == ("cached", "window")
    assert known.losses[1] == ({"cached": 0.05}, {"cached": 0.4, "window": 0.15}, {"cached": 0.9, "window": 0.8})
    assert (known.limits, known.drift) == ((0.1, 0.2, 0.3), (0.0, 0.02, 0.035))
    assert (known.full_seconds, known.plan_seconds) == ((0.2, 0.21, 0.19), (0.2, 0.1, 0.15))
    assert (known.predicted, known.measured) == (DATA["predicted"], DATA["measured"])
    assert known == calibration_of(plan_of(DATA))
    with pytest.raises(AttributeError):
        known.seed = 4


@pytest.mark.parametrize("data", [None, 3, "greedy", [DATA]])
def test_no_calibration(data):
    assert calibration_of(plan_of(data)) is None
    assert first_admitting_threshold(plan_of(data)) is None


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("search", 3),
        ("threshold", "0.3"),
        ("threshold", True),
        ("threshold", 10**400),
        ("loss", None),
        ("candidates", "cached"),
        ("candidates", ["cached", 3]),
        ("samples", 8.5),
        ("seed", False),
        ("losses", {}),
        ("losses", DATA["losses"][:2]),
        ("losses", [[{}, {}, {}], [{}, {}], [{}, {}, {}]]),
        ("losses", [[{}, {}, {}], [{}, None, {}], [{}, {}, {}]]),
        ("limits", [0.1, 0.2]),
        ("limits", [0.1, None, 0.2]),
        ("drift", [0.0, "0.1", 0.2]),
        ("drift", 0.1),
        ("predicted", [1.5]),
        ("measured", 1.5),
    ],
)
def test_a_wrong_part_is_missing_and_the_others_stay(field, wrong):
    known, right = calibration_of(plan_of(DATA | {field: wrong})), calibration_of(plan_of(DATA))
    assert getattr(right, field) is not None
    assert getattr(known, field) is None
    for other in set(Calibration.__slots__) - {field}:
        assert getattr(known, other) == getattr(right, other)


@pytest.mark.parametrize("wrong", [None, 3, [1, 2, 3], {}, {"full": [0.1, 0.2], "plan": "fast"}])
def test_wrong_step_seconds(wrong):
    known = calibration_of(plan_of(DATA | {"step_seconds": wrong}))
    assert (known.full_seconds, known.plan_seconds) == (None, None)


def test_what_is_no_number_is_left_out_of_free_form_parts():
    known = calibration_of(plan_of(DATA | {"measured": {"speed_up": 2, "note": "on a laptop", "ok": True}}))
    assert known.measured == {"speed_up": 2.0}


@given(data=st.dictionaries(st.sampled_from([*DATA, "other"]), json_values) | json_values)
@settings(max_examples=200, deadline=None)
def test_no_provenance_is_an_exception(data):
    for rows in (ROWS, [["full"] * 3] * 3):
        plan = plan_of(data, methods=rows)
        assert summary(plan).startswith("9 cells: full ")
        first_admitting_threshold(plan)


# The text


def test_the_summary_tells_the_gain():
    assert summary(plan_of(DATA)).splitlines() == [
        "9 cells: full 6 (67%), window 2 (22%), cached 1 (11%)",
        "greedy search, threshold 0.3, paper loss, 8 samples",
        "predicted: 1.50x the speed of full attention, 75% of the attention's operations",
        "measured: 1.33x the speed of full attention, final sample 3.6% away from the uncompressed one (relative L2)",
    ]
    assert summary(plan_of()) == "9 cells: full 6 (67%), window 2 (22%), cached 1 (11%)"


def test_why_a_plan_is_all_full():
    # L * M / i: cached 0.35 * 3/3 = 0.35, window 0.31 * 3/2 = 0.465, window 0.2 * 3/1 = 0.6, and others above.
    assert first_admitting_threshold(stuck()) == (pytest.approx(0.35), 2, "blocks.2.attn", "cached")
    assert summary(stuck()).splitlines()[-5:] == [
        "every cell is full: no candidate's loss was below its layer's limit",
        "  cached at step 2, blocks.2.attn: loss 0.35, limit 0.3",
        "  window at step 1, blocks.1.attn: loss 0.31, limit 0.2",
        "  cached at step 1, blocks.1.attn: loss 0.4, limit 0.2",
        "a threshold above 0.35 would have admitted the first of these",
    ]
    assert first_admitting_threshold(stuck(losses=None)) is None


def test_only_an_all_full_plan_of_the_greedy_search_is_explained():
    for plan in (plan_of(DATA), stuck(search="budget"), stuck(search=None)):
        assert first_admitting_threshold(plan) is None
        assert "every cell" not in summary(plan)


# The figure


@pytest.mark.parametrize("path", [REAL, None], ids=["real", "small"])
def test_the_map_shows_the_plan(path):
    plan = Plan.load(path) if path else plan_of()
    (axes,) = figure_of(plan).axes
    (image,) = axes.images
    expected = [[to_rgb(COLOURS[method]) for method in row] for row in plan.methods]
    np.testing.assert_allclose(image.to_rgba(image.get_array())[..., :3], expected)
    # Step 0 on top, layer 0 on the left, each cell around its number.
    assert tuple(image.get_extent()) == (-0.5, len(plan.sites) - 0.5, plan.steps - 0.5, -0.5)
    assert axes.get_ylim() == (plan.steps - 0.5, -0.5)


def test_the_words_of_the_map():
    figure = figure_of(plan_of())
    assert [text.get_text() for text in figure.texts] == ["DiT: 3 steps \N{MULTIPLICATION SIGN} 3 sites, window ±8"]
    (legend,) = figure.legends
    assert texts(legend) == ["full 67%", "window 22%", "cached 11%"]
    shown = [patch.get_facecolor()[:3] for patch in legend.get_patches()]
    assert shown == [to_rgb(COLOURS[method]) for method in (Method.FULL, Method.WINDOW, Method.CACHED)]
    (axes,) = figure.axes
    assert axes.get_xlabel() == "layer\n0 = blocks.0.attn\n2 = blocks.2.attn"
    assert axes.get_ylabel() == "step"


@pytest.mark.parametrize("shown", [s for n in range(4) for s in itertools.combinations(PANELS, n)], ids="+".join)
def test_a_panel_for_each_part_that_is_there(shown):
    data = {name: value for name, value in DATA.items() if name not in PANELS or name in shown}
    titles = [axes.get_title(loc="left") for axes in figure_of(plan_of(data)).axes]
    assert titles == ["", *(PANELS[name] for name in PANELS if name in shown)]


def test_times_need_both_runs():
    data = {"step_seconds": {"full": [1, 2, 3]}}
    assert len(figure_of(plan_of(data)).axes) == 1


@pytest.mark.parametrize(("scale", "unit", "shown"), [(1, "ms", 1e3), (10, "s", 1)])
def test_times(scale, unit, shown):
    seconds = {name: [scale * time for time in times] for name, times in DATA["step_seconds"].items()}
    axes = axes_by_title(figure_of(plan_of({"step_seconds": seconds})))["time per step"]
    for bars, times in zip(axes.containers, (seconds["full"], seconds["plan"]), strict=True):
        assert [bar.get_width() for bar in bars] == pytest.approx([time * shown for time in times])
        assert [bar.get_y() + bar.get_height() / 2 for bar in bars] == pytest.approx([0, 1, 2])
    assert axes.get_xlabel() == unit
    assert texts(axes.get_legend()) == [f"full, {0.6 * scale:.3g} s in all", f"plan, {0.45 * scale:.3g} s in all"]


def test_losses():
    axes = axes_by_title(figure_of(plan_of(DATA)))["loss of chosen methods"]
    largest, middle = axes.lines
    # Step 0 was not searched; step 1 chose cached (0.05) and window (0.15); step 2 window (0.07) alone.
    np.testing.assert_allclose(largest.get_xdata(), [np.nan, 0.15, 0.07])
    np.testing.assert_allclose(middle.get_xdata(), [np.nan, 0.1, 0.07])
    assert list(largest.get_ydata()) == [0, 1, 2]
    (band,) = axes.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((0.1, 0.3))
    assert texts(axes.get_legend()) == ["limits of the layers", "largest", "median"]
    assert axes.get_xlabel() == "paper loss"


def test_losses_without_limits_or_choices():
    axes = axes_by_title(figure_of(plan_of(DATA | {"limits": None})))["loss of chosen methods"]
    assert not axes.patches
    assert texts(axes.get_legend()) == ["largest", "median"]
    assert "loss of chosen methods" not in axes_by_title(figure_of(stuck()))


def test_drift():
    axes = axes_by_title(figure_of(plan_of(DATA)))["drift of the latents"]
    (line,) = axes.lines
    assert list(line.get_xdata()) == DATA["drift"]
    assert list(line.get_ydata()) == [0, 1, 2]
    assert texts(axes.get_legend()) == ["0.035 at the end"]


def test_panels_share_the_steps_of_the_map():
    cells, *panels = figure_of(plan_of(DATA)).axes
    for axes in panels:
        assert axes.get_ylim() == cells.get_ylim()
        assert (axes.get_position().y0, axes.get_position().y1) == (cells.get_position().y0, cells.get_position().y1)


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
@pytest.mark.parametrize(("steps", "sites"), [(1, 1), (3, 1), (3, 60), (20, 28), (50, 16), (250, 1), (250, 60)])
def test_readable_at_every_size(steps, sites, calibrated):
    figure = figure_of(mixed(steps, sites, calibrated=calibrated))
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    groups = [[*figure.texts], *([*legend.get_texts()] for legend in figure.legends)]
    for axes in figure.axes:
        legend = axes.get_legend()
        titles = [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        left, right = axes.get_xlim()
        numbers = [text for text in axes.get_xticklabels() if left <= text.get_position()[0] <= right]
        groups += [titles, numbers, axes.get_yticklabels(), legend.get_texts() if legend else []]
    shown = [text for group in groups for text in group if text.get_visible() and text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in shown]
    assert min(text.get_fontsize() for text in shown) >= 7
    for word, box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, word
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, word
    for (word, box), (other, around) in itertools.combinations(boxes, 2):
        assert not box.overlaps(around), (word, other)
    cells = figure.axes[0]
    for labels in (cells.get_xticklabels(), cells.get_yticklabels()):
        for label, after in itertools.pairwise(text.get_window_extent(renderer) for text in labels):
            assert not label.padded(5).overlaps(after)
    for count, ticks in ((steps, cells.get_yticks()), (sites, cells.get_xticks())):
        assert ticks[0] == 0
        assert len(ticks) > min(count, 10) / 2


def test_a_small_share_is_not_nothing():
    rows = [["full"] * 300, ["cached"] + ["full"] * 299]
    plan = plan_of(steps=2, sites=[f"b.{i}" for i in range(300)], methods=rows)
    assert texts(figure_of(plan).legends[0]) == ["full 100%", "cached <1%"]


def test_names_that_are_no_plain_text(tmp_path):
    plan = plan_of(sites=["a$\\frac{$", "\ud800", "模型" * 40], denoiser="$x_{\n")
    plot_plan(plan, tmp_path / "plan.png")
    figure = figure_of(plan)
    assert figure.texts[0].get_text().startswith("'$x_{\\n'"[1:-1])
    assert "0 = a$\\frac{$\n2 = \\u6a21" in figure.axes[0].get_xlabel()
    assert "…" in figure.axes[0].get_xlabel()


def lab(rgb: np.ndarray) -> np.ndarray:
    """OKLab of linear RGB."""
    lms = rgb @ np.array([[0.4122, 0.2119, 0.0883], [0.5363, 0.6807, 0.2817], [0.0514, 0.1074, 0.6300]])
    to_lab = [[0.2105, 1.9780, 0.0259], [0.7936, -2.4286, 0.7828], [-0.0041, 0.4506, -0.8087]]
    return np.cbrt(np.clip(lms, 0, None)) @ np.array(to_lab)


# Machado, Oliveira and Fernandes 2009, severity 1; and no colour at all.
@pytest.mark.parametrize(
    ("sight", "least"),
    [
        (np.eye(3), 0.1),
        ([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0519]], 0.1),
        ([[0.3673, 0.8606, -0.2280], [0.2803, 0.6727, 0.0471], [-0.0118, 0.0429, 0.9689]], 0.1),
        ([[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]], 0.1),
        ([[0.2126, 0.7152, 0.0722]] * 3, 0.03),
    ],
    ids=["normal", "protan", "deutan", "tritan", "grey"],
)
def test_colours_can_be_told_apart(sight, least):
    srgb = np.array([to_rgb(colour) for colour in COLOURS.values()])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = lab(linear @ np.asarray(sight).T)
    assert set(COLOURS) == set(Method)
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > least


def test_the_callers_settings_neither_matter_nor_change(tmp_path):
    first = plot_plan(plan_of(DATA), tmp_path / "a.png").read_bytes()
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "black", "savefig.dpi": 30, "text.color": "red"}):
        before = dict(mpl.rcParams.copy())
        assert plot_plan(plan_of(DATA), tmp_path / "b.png").read_bytes() == first
        assert dict(mpl.rcParams.copy()) == before


def test_what_is_imported(tmp_path):
    code = (
        "import sys; from difa_fx.report import figure_of, plot_plan; from difa_fx.plan import Plan;"
        "plan = Plan.full(['a'], steps=2);"
        "assert not {'matplotlib', 'torch', 'numpy'} & set(sys.modules);"
        "plot_plan(plan, 'plan.png');"
        "import matplotlib;"
        "print({'matplotlib.pyplot', 'torch'} & set(sys.modules), matplotlib.get_backend(auto_select=False))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "set() None", done.stderr


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OptionError) as caught:
        plot_plan(plan_of(), tmp_path / "plan.png")
    assert "pip install 'difa_fx[report]'" in str(caught.value)
    assert not list(tmp_path.iterdir())


# Files


@pytest.mark.parametrize(
    ("name", "magic"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml"), ("a.pdf", b"%PDF"), ("a.b.Png", b"\x89PNG")]
)
def test_the_suffix_says_as_what(name, magic, tmp_path):
    path = tmp_path / name
    assert plot_plan(plan_of(DATA), str(path)) == path
    data = path.read_bytes()
    assert data.startswith(magic)
    assert plot_plan(plan_of(DATA), path).read_bytes() == data  # equal plans, equal files
    assert [item.name for item in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("name", "got"), [("plan.jpg", ".jpg"), ("plan", "no suffix"), (".png", "no suffix")])
def test_other_suffixes(name, got, tmp_path):
    with pytest.raises(OptionError) as caught:
        plot_plan(plan_of(), tmp_path / name)
    assert (caught.value.got, caught.value.allowed) == (got, [".png", ".svg", ".pdf"])
    assert caught.value.where == str(tmp_path / name)
    assert caught.value.todo
    assert not list(tmp_path.iterdir())


def raising(error: Exception):
    def function(*_: object, **__: object) -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("target", "error", "expected"),
    [
        ("matplotlib.figure.Figure.savefig", RuntimeError("broken"), RuntimeError),
        ("os.fsync", OSError(28, "No space left on device"), PlanFileError),
        ("pathlib.Path.replace", OSError(13, "Permission denied"), PlanFileError),
    ],
)
def test_a_fault_on_the_way_leaves_the_old_file(target, error, expected, tmp_path, monkeypatch):
    path = tmp_path / "plan.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(target, raising(error))
    with pytest.raises(expected, match=error.args[-1]):
        plot_plan(plan_of(), path)
    assert [item.name for item in tmp_path.iterdir()] == ["plan.png"]
    assert path.read_bytes() == b"old"


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "no" / "plan.png", tmp_path / "folder.png", "a\0b.png"):
        with pytest.raises(PlanFileError) as caught:
            plot_plan(plan_of(), path)
        assert caught.value.where == str(path)
        assert caught.value.allowed and caught.value.todo
    assert [item.name for item in tmp_path.iterdir()] == ["folder.png"]


def test_a_link_stays_a_link(tmp_path):
    real, link = tmp_path / "real.png", tmp_path / "link.png"
    real.write_bytes(b"old")
    link.symlink_to(real)
    plot_plan(plan_of(), link)
    assert link.is_symlink()
    assert real.read_bytes().startswith(b"\x89PNG")


# The command


def test_show(tmp_path, capsys):
    path = tmp_path / "plan.json"
    plan_of().save(path)
    assert cli.main(["show", str(path)]) == 0
    assert capsys.readouterr().out == cli.format_plan(plan_of()) + "\n"
    plan_of(DATA).save(path)
    assert cli.main(["show", str(path)]) == 0
    assert capsys.readouterr().out == f"{cli.format_plan(plan_of())}\n\n{summary(plan_of(DATA))}\n"


@pytest.mark.parametrize("option", ["-o", "--output"])
def test_show_draws(option, tmp_path, capsys):
    path, figure = tmp_path / "plan.json", tmp_path / "plan.png"
    plan_of(DATA).save(path)
    assert cli.main(["show", str(path), option, str(figure)]) == 0
    assert capsys.readouterr().out == f"{figure}: {plan_of()}\n"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["show", str(path), option, str(tmp_path / "plan.gif")]) == 1
    assert "allowed: .png, .svg, .pdf" in capsys.readouterr().err
