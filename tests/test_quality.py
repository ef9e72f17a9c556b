"""The quality benchmark runs and resumes at a tiny size, its maths is right, and its words follow the numbers."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import digits
import pytest
import scipy.linalg
import torch
from benchmark_commands import command

from difa_fx import Plan

SITES = [f"transformer_blocks.{i}.attn1" for i in range(6)]
TINY = [
    "--compiler=eager",
    "--images=2",
    "--batch=1",
    "--pairs=1",
    "--steps=2",
    "--samples=3",
    "--no-bundled",
    "--budgets",
]


@pytest.fixture(scope="module")
def quality() -> Any:
    return command("quality")


@pytest.fixture(scope="module")
def report(quality: Any) -> Any:
    return sys.modules["quality_report"]


@pytest.fixture
def measured(quality: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The rows that were measured; no picture is drawn for them, and the second is interrupted."""
    titles: list[str] = []

    def measure(title: str, plan: Plan | None, options: Any) -> Any:
        titles.append(title)
        if len(titles) == 2:
            raise KeyboardInterrupt
        kinds = ["inductor"] if plan is None else ["inductor", "difa"]
        seconds = {"inductor": [2.0, 4.0], "difa": [1.0, 2.0]}
        images = torch.linspace(-1, 1, options.images * 1024).reshape(options.images, 1, 32, 32)
        costs = {"flops_kept": 1.0, "flops_kept_with_projections": 1.0, "state_bytes": 0}
        return quality.Measured(
            images=dict.fromkeys(kinds, images),
            seconds={kind: seconds[kind] for kind in kinds},
            compile_seconds=dict.fromkeys(kinds, 1.0),
            costs=costs,
        )

    monkeypatch.setattr(quality, "_measure", measure)
    return titles


@dataclass
class Calibrate:
    """In place of ``difa_fx.calibrate``: half of the steps cached; notes how it was called."""

    calls: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, pipe: Any, samples: Any, **settings: Any) -> Plan:
        assert Path(settings.pop("cache_dir")).name == ".searches"
        self.calls.append({"pipe": type(pipe).__name__, "samples": samples, **settings})
        found = {"predicted": {"speed_up": 1.25}, "measured": {}}
        return Plan.uniform(SITES, steps=2, every=2, cfg="cond_first", provenance={"calibration": found})


def row(report: Any, name: str = "Inductor", **values: Any) -> Any:
    """A row of numbers made up for the test."""
    series, _, setting = name.partition(" ")
    made = dict.fromkeys(report.Row.__dataclass_fields__, 1.0)
    made |= {"setting": float(setting.rstrip("x")) if setting else None}
    return report.Row(**(made | {"name": name, "series": series.lower()} | values))


# The command


@pytest.mark.slow
def test_the_benchmark_writes_its_table_figure_and_plans(
    quality: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, calibrate = tmp_path / "made" / "quality-0.1", Calibrate()
    rows = quality.main([*TINY, "--thresholds", "0.1", "-o", str(output)], calibrate=calibrate)
    assert [r.name for r in rows] == ["Inductor", "threshold 0.1"]
    assert calibrate.calls == [
        {
            "pipe": "DiTPipeline",
            "samples": [0, 1, 2],
            "num_inference_steps": 2,
            "threshold": 0.1,
            "window": 128,
            "seed": 0,
            "cfg": "cond_first",
            "compiler": "eager",
            "progress": True,
            "pipeline_kwargs": {"guidance_scale": 3.0, "output_type": "pt"},
        }
    ]
    plain, planned = rows
    assert (plain.speed_up, plain.flops_kept, plain.relative_l1, plain.psnr, plain.search_seconds) == (
        1,
        1,
        0,
        None,
        None,
    )
    assert plain.ssim == pytest.approx(1)
    assert planned.flops_kept == planned.flops_kept_with_projections == 0.5
    assert (planned.predicted_speed_up, planned.calibrated_speed_up) == (1.25, None)
    assert (plain.pairs, planned.pairs) == (2, 1)
    assert planned.relative_l1 > 0
    assert planned.ssim < 1
    assert planned.state_bytes > 0
    record = json.loads((tmp_path / "made" / "quality-0.1.json").read_text())
    assert [quality.Row(**found).name for found in record["rows"]] == ["Inductor", "threshold 0.1"]
    assert Plan.load(output / "threshold-0.1.json").steps == 2
    text = (tmp_path / "made" / "quality-0.1.md").read_text()
    assert "| threshold 0.1 |" in text
    assert text in capsys.readouterr().out
    assert (tmp_path / "made" / "quality-0.1.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_goes_on_where_it_stopped(quality: Any, measured: list[str], tmp_path: Path) -> None:
    arguments, calibrate = [*TINY, "1.5", "-o", str(tmp_path / "q"), "--thresholds"], Calibrate()
    with pytest.raises(KeyboardInterrupt):
        quality.main(arguments, calibrate=calibrate)
    assert measured == ["Inductor", "budget 1.5x"]
    (call,) = calibrate.calls
    assert call["target_speedup"] == 1.5
    assert "threshold" not in call

    rows = quality.main(arguments, calibrate=calibrate)  # the search was done already, and the first row too
    assert measured == ["Inductor", "budget 1.5x", "budget 1.5x"]
    assert [r.speed_up for r in rows] == [1, 2]
    assert quality.main(arguments, calibrate=calibrate) == rows
    assert (len(measured), len(calibrate.calls)) == (3, 1)

    more = quality.main([*arguments, "0.1"], calibrate=calibrate)
    assert [r.name for r in more] == ["Inductor", "threshold 0.1", "budget 1.5x"]
    assert (len(measured), len(calibrate.calls)) == (4, 2)
    with pytest.raises(SystemExit, match=r"another settings.*--fresh"):
        quality.main([*arguments, "--samples", "4"], calibrate=calibrate)
    quality.main([*arguments, "--samples", "4", "--fresh"], calibrate=calibrate)
    assert (len(measured), len(calibrate.calls)) == (6, 3)


def test_a_search_that_fails_is_an_error_and_loses_nothing(quality: Any, measured: list[str], tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> Plan:
        raise ValueError("no plan is that fast")

    with pytest.raises(ValueError, match="no plan is that fast"):
        quality.main([*TINY, "9", "--thresholds", "-o", str(tmp_path / "q")], calibrate=fail)
    assert (
        [found["name"] for found in json.loads((tmp_path / "q.json").read_text())["rows"]] == measured == ["Inductor"]
    )


def test_the_bundled_plan_is_measured_again_when_it_changed(
    quality: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = quality._options(["-o", str(tmp_path / "q"), "--thresholds", "--budgets"])
    _, job = quality._jobs(options)
    assert job == ("bundled", "bundled", None)
    record = quality._open(options)
    assert not quality._is_done(job, record, options)
    assert quality._plan(job, record, options, None) == Plan.load(digits.FOLDER / "plan.json")
    record["rows"] = [{"name": "bundled"}]
    assert quality._is_done(job, record, options)
    changed = Plan.uniform(SITES, steps=20, every=2, provenance={"made by": "hand"})
    monkeypatch.setattr(quality, "_bundled", lambda: changed)
    assert not quality._is_done(job, record, options)
    assert quality._jobs(options)[1].name == "hand-made"


@pytest.mark.parametrize(
    "wrong", [["--images=1"], ["--images=30", "--batch=20"], ["--pairs=6"], ["--pairs=0"], ["--calibration-seed=3"]]
)
def test_settings_that_would_spoil_the_table_are_refused(quality: Any, wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        quality.main(["-o", "never-written", *wrong], calibrate=Calibrate())
    assert not Path("never-written.json").exists()


# What the table says


def test_flops_that_never_rise_are_said_to(report: Any) -> None:
    kept = {0.05: 0.7, 0.025: 0.9, 0.075: 0.7}
    rows = [row(report), *(row(report, f"threshold {t}", flops_kept=k) for t, k in kept.items())]
    assert "Attention FLOPs kept never rise with the threshold." in report.explain(rows)


def test_every_rise_of_flops_is_named(report: Any) -> None:
    kept = {0.025: 0.9, 0.05: 0.6, 0.075: 0.65, 0.1: 0.5, 0.125: 0.52}
    rows = [row(report), *(row(report, f"threshold {t}", flops_kept=k) for t, k in kept.items())]
    text = report.explain(rows)
    assert "Attention FLOPs kept rise: 60.0% at 0.05, 65.0% at 0.075; 50.0% at 0.1, 52.0% at 0.125." in text
    assert "With projections they never rise" in text


def test_one_threshold_says_nothing_of_a_trend(report: Any) -> None:
    assert "rise" not in report.explain([row(report), row(report, "threshold 0.1")])


def test_the_goal_takes_speed_accuracy_and_likeness(report: Any) -> None:
    plain = row(report, accuracy=0.98)
    good = row(report, "budget 1.5x", speed_up=1.5, ssim=0.95, accuracy=0.97)
    assert "is reached by budget 1.5x (1.50x)." in report.explain([plain, good])
    for spoilt in ({"speed_up": 1.49}, {"ssim": 0.9499}, {"accuracy": 0.96}):
        assert "by no row" in report.explain([plain, replace(good, **spoilt)])
    assert "the fastest: budget 1.5x is 1.49x" in report.explain([plain, replace(good, speed_up=1.49)])
    assert "none is as good" in report.explain([plain])


def test_labels_of_points_in_one_place_are_apart(report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    placed: list[tuple[float, float]] = []
    annotate = Axes.annotate
    monkeypatch.setattr(Axes, "annotate", lambda self, *a, **k: placed.append(a[2]) or annotate(self, *a, **k))
    same = {"speed_up": 1.4, "ssim": 0.97}
    names = ("threshold 0.1", "threshold 0.2", "budget 1.4x")
    report.draw([row(report), *(row(report, name, **same) for name in names)], tmp_path / "figure.png")
    assert len(set(placed)) == 3


# The maths in examples/digits.py


def test_frechet_distance_of_a_set_to_itself_is_nothing() -> None:
    images = digits.digit_images().images[:200]
    assert digits.frechet_distance(images, images) == pytest.approx(0, abs=1e-9)
    assert digits.frechet_distance(images, images.flip(0)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_a_shifted_copy_is_that_of_the_means() -> None:
    images = digits.digit_images().images[:200]
    assert digits.frechet_distance(images + 0.25, images) == pytest.approx(64 * 0.25**2, rel=1e-5)


def test_frechet_distance_of_a_scaled_copy_is_that_of_the_spreads() -> None:
    """Covariances S and 9 S: tr(S + 9 S - 2 * 3 S) = 4 tr(S)."""
    images = digits.digit_images().images[:200]
    centred = images - images.mean(0)
    variance = digits._features(centred).var(axis=0, ddof=1).sum()
    assert digits.frechet_distance(3 * centred, centred) == pytest.approx(4 * variance, rel=1e-5)


@pytest.mark.parametrize("few", [40, 400])
def test_frechet_distance_agrees_with_the_matrix_square_root(few: int) -> None:
    images = digits.digit_images().images
    a, b = (torch.from_numpy(digits._features(part)) for part in (images[:few], images[few:]))
    root = scipy.linalg.sqrtm((torch.cov(a.T) @ torch.cov(b.T)).numpy()).real
    expected = (
        (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * root.trace()
    )
    assert digits.frechet_distance(images[:few], images[few:]) == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("count", [0, 1])
def test_frechet_distance_needs_two_images(count: int) -> None:
    images = digits.digit_images().images
    with pytest.raises(ValueError, match=f"at least 2 images; there are {count}"):
        digits.frechet_distance(images, images[:count])


def test_distances_of_images_a_constant_apart() -> None:
    reference = torch.zeros(3, 1, 32, 32)
    found = digits.distances(reference + 0.2, reference)  # 0.5 and 0.6 between black and white
    assert found["relative_l1"] == pytest.approx(0.2, rel=1e-4)
    assert found["psnr"] == pytest.approx(20, rel=1e-4)
    assert found["ssim"] == pytest.approx((2 * 0.5 * 0.6 + 1e-4) / (0.5**2 + 0.6**2 + 1e-4), rel=1e-3)
