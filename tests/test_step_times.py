"""What a calibration says of seconds: fitted to whole steps, free of compilation; and where a plan runs elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attached import STEPS, Pipe, generate
from diffusers import DDIMScheduler
from models import dit, tensor_of
from torch import nn

import difa_fx
import difa_fx.device_time
from difa_fx.calibration_job import CalibrationJob
from difa_fx.elsewhere import other_device, other_timesteps
from difa_fx.plan import Method, Plan
from difa_fx.runtime import Runner
from difa_fx.search import SearchGraph
from difa_fx.step_times import fitted
from difa_fx.verification import Measured

REGIONS = {
    "a": {"full": 4.0, "full->r": 5.0, "window": 2.0},
    "b": {"full": 2.0},  # no window there
}


def test_seconds_add_up_to_whole_steps() -> None:
    steps = {"full": 22.0, "cached": 10.0, "window": 17.0}
    found = fitted(REGIONS, steps)
    assert steps["cached"] + found["a"]["full"] + found["b"]["full"] == pytest.approx(steps["full"])
    assert steps["cached"] + found["a"]["window"] + found["b"]["full"] == pytest.approx(steps["window"])
    assert found["a"]["full->r"] / found["a"]["full"] == pytest.approx(5 / 4)


def test_seconds_are_never_negative() -> None:
    found = fitted(REGIONS, {"full": 9.0, "cached": 10.0, "window": 1.0})
    assert all(spent == 0 for name, spent in found["a"].items())


def test_what_cannot_be_fitted_stays() -> None:
    assert fitted(REGIONS, {}) == REGIONS


def sample(model: nn.Module, samples: Sequence[Any]) -> torch.Tensor:
    """A generation of four calls."""
    latents, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    for t in (900, 600, 300, 100):
        noise = tensor_of(model(latents, timestep=torch.full((2,), t), class_labels=labels))
        latents = latents - 0.1 * noise[:, :4]
    return latents


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that knows what things take: a second to compile a program, 10 ms a call and 50 a site that computes."""
    now = 0.0
    compiled, run = Runner._compiled, Runner._run

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    def slowly(self: Runner, schedule: Any) -> Any:
        spend(1.0)
        return compiled(self, schedule)

    def as_its_sites(self: Runner, args: Any, session: Any, ahead: Any) -> Any:
        row = self.schedule.row(session.clock.position)
        spend(0.01 + 0.05 * sum(entry.runs for entry in row.values()))
        return run(self, args, session, ahead)

    def region(self: SearchGraph, frontier: Any, entries: Any) -> None:
        spend(0.02)  # much less than what it is worth in a step

    monkeypatch.setattr(Runner, "_compiled", slowly)
    monkeypatch.setattr(Runner, "_run", as_its_sites)
    monkeypatch.setattr(SearchGraph, "run_site", region)
    monkeypatch.setattr(difa_fx.device_time, "time", SimpleNamespace(perf_counter=lambda: now))


def calibrated(tmp_path: Path, **settings: Any) -> Plan:
    return difa_fx.calibrate(
        dit(layers=2).model,
        [0, 1],
        num_inference_steps=4,
        sampler=sample,
        compiler="eager",
        window=4,
        cfg=None,
        candidates=["cached"],
        progress=False,
        cache_dir=tmp_path,
        **settings,
    )


def test_what_is_measured_holds_no_compilation(clockwork: None, tmp_path: Path) -> None:
    measured = calibrated(tmp_path, threshold=10.0, verify=2).provenance["calibration"]["measured"]
    # Every step but the first reuses both sites.
    assert measured["seconds"] == pytest.approx({"full": 4 * 0.11, "plan": 0.11 + 3 * 0.01})
    assert measured["speed_up"] == pytest.approx(0.44 / 0.14)


def test_a_target_that_only_the_cheapest_methods_reach_is_met(clockwork: None, tmp_path: Path) -> None:
    plan = calibrated(tmp_path, target_speedup=2.0, verify=1)
    found = plan.provenance["calibration"]
    assert found["measured"]["speed_up"] >= 2.0
    assert found["predicted"]["speed_up"] == pytest.approx(found["measured"]["speed_up"])


def test_a_target_is_refused_only_after_a_generation(
    clockwork: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []
    measured = CalibrationJob.measured

    def noted(self: CalibrationJob, plan: Plan, pairs: int) -> Measured:
        plans.append(plan)
        return measured(self, plan, pairs)

    monkeypatch.setattr(CalibrationJob, "measured", noted)
    with pytest.raises(difa_fx.DifaError, match="times the speed of full attention, measured"):
        calibrated(tmp_path, target_speedup=50.0)
    assert {m for row in plans[0].methods[1:] for m in row} == {Method.CACHED}


def test_a_search_compiles_as_the_backend_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    import difa_fx.backend
    import difa_fx.search

    for module in (difa_fx.backend, difa_fx.search):
        make = module.compiler_for

        def kept(sites: Any, make: Any = make, **settings: Any) -> Any:
            found.append((make(sites, **settings), settings))
            return found[-1][0]

        monkeypatch.setattr(module, "compiler_for", kept)
    inductor = {"triton.cudagraphs": True, "epilogue_fusion": False}
    model = dit(layers=2).model
    settings: dict[str, Any] = {"compiler": "eager", "window_kernel": "sdpa", "inductor": inductor}
    plan = difa_fx.calibrate(
        model,
        [0, 1],
        num_inference_steps=4,
        sampler=sample,
        threshold=10.0,
        window=4,
        cfg=None,
        candidates=["window"],
        verify=0,
        progress=False,
        cache_dir=tmp_path,
        **settings,
    )
    compiled = torch.compile(model, backend="difa", options={"plan": plan, **settings})
    with torch.no_grad():
        sample(compiled, [])
    (searched, its), (ran, theirs) = found
    assert its == theirs
    assert dict(searched.patches) == dict(ran.patches) == {"triton.cudagraphs": False, "epilogue_fusion": False}
    assert searched.settings == ran.settings


# Elsewhere


def plan_of(**calibration: Any) -> Plan:
    sites = dit(layers=2).sites
    rows = [["full"] * 2, *[["cached"] * 2] * (STEPS - 1)]
    timesteps = calibration.pop("timesteps", None)
    provenance = {"calibration": calibration}
    return Plan(steps=STEPS, sites=sites, methods=rows, window=4, cfg=None, timesteps=timesteps, provenance=provenance)


def warned(plan: Plan, scheduler: Any, times: int = 2) -> list[str]:
    pipe = Pipe(dit(layers=2).model, scheduler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        difa_fx.attach(pipe, plan, compiler="eager")
        for seed in range(times):
            generate(pipe, seed)
        difa_fx.detach(pipe)
    return [str(w.message) for w in caught if w.category is difa_fx.PlanWarning]


def test_a_run_like_the_calibration_tells_nothing() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    tokens = dict.fromkeys(dit(layers=2).sites, 64)
    plan = plan_of(
        tokens=tokens, scheduler="DDIMScheduler", device={"type": "cpu"}, timesteps=scheduler.timesteps.tolist()
    )
    assert warned(plan, DDIMScheduler()) == []


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        ({"tokens": {"transformer_blocks.0.attn1": 1024}}, "has 64 tokens here, and had 1024 there"),
        (
            {"scheduler": "EulerDiscreteScheduler"},
            "the scheduler is DDIMScheduler here, and was EulerDiscreteScheduler",
        ),
        ({"device": {"type": "cuda", "name": "NVIDIA H200"}}, "ran on NVIDIA H200 there"),
        ({"timesteps": [999.0, 700.0, 400.0, 200.0, 1.0]}, "step 0 has timestep 800 here, and 999 in the plan"),
    ],
)
def test_a_run_elsewhere_is_told_once(calibration: dict[str, Any], said: str) -> None:
    (text,) = warned(plan_of(**calibration), DDIMScheduler())
    assert said in text


@pytest.mark.parametrize("calibration", [{"tokens": [1]}, {"tokens": {"x": "y"}}, {"device": 3}, {"scheduler": {}}])
def test_provenance_of_another_form_is_not_compared(calibration: dict[str, Any]) -> None:
    assert warned(plan_of(**calibration), DDIMScheduler(), times=1) == []


def test_another_processor_matters_for_a_budget_of_seconds() -> None:
    here = {"type": "cpu", "name": "A", "threads": 2}
    there = {"type": "cpu", "name": "B", "threads": 2}
    assert other_device(plan_of(device=there), here) is None
    assert "runs on A, 2 threads" in str(other_device(plan_of(device=there, target_speedup=1.5), here))


def test_rounded_timesteps_are_not_another_schedule() -> None:
    plan = plan_of(timesteps=[1000.0, 750.0, 500.0, 250.0, 1.0])
    rounded = torch.tensor(plan.timesteps, dtype=torch.bfloat16).tolist()
    assert other_timesteps(plan, rounded) is None
    assert other_timesteps(plan, [1000.0, 900.0, 700.0, 400.0, 1.0]) is not None
