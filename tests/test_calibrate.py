"""Calibration: the greedy search is the paper's, goes on where it was stopped, and says what is wrong."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from digits import PixelVAE
from models import Case, case, dit, tensor_of, wake
from plain_search import plain_search
from torch import nn
from zoo import text_of, zoo_case

import difa_fx
import difa_fx.calibration
from difa_fx.checkpoint import Record
from difa_fx.errors import CalibrationError, DifaError, OptionError, PlanError, PlanFileError
from difa_fx.findings import first_admitting_threshold
from difa_fx.greedy import Greedy
from difa_fx.losses import loss as loss_named
from difa_fx.plan import Plan
from difa_fx.search import SearchGraph

STEPS = 4


def sampler(calls: Sequence[Any]) -> Any:
    """A generation that shows the denoiser ``calls``, whatever it answers."""

    def sample(model: nn.Module, samples: Sequence[Any]) -> torch.Tensor:
        return [tensor_of(model(*args, **kwargs)).clone() for args, kwargs in calls][-1]

    return sample


def calibrated(found: Case, calls: Sequence[Any], cache: Path, **settings: Any) -> Plan:
    settings = {"window": 8, "compiler": "eager", "verify": 0, "cache_dir": cache, "progress": False, **settings}
    return difa_fx.calibrate(found.model, [0] * 2, num_inference_steps=len(calls), sampler=sampler(calls), **settings)


MIXED = [("dit", 0.12), ("pixart", 0.05), ("toy_three_blocks", 0.12)]
"""Thresholds at which the plan has three methods or more."""


@pytest.mark.parametrize(("name", "threshold"), [*MIXED, ("dit", 0.3), ("pixart", 0.3), ("toy_three_blocks", 0.02)])
@pytest.mark.parametrize("loss", ["paper", "reference"])
def test_the_search_is_the_papers(name: str, threshold: float, loss: str, tmp_path: Path) -> None:
    search_is_the_papers(case(name), threshold, loss, tmp_path, mixed=(name, threshold) in MIXED)


def test_the_search_is_the_papers_on_joint_attention(tmp_path: Path) -> None:
    search_is_the_papers(zoo_case("sd3"), 0.5, "paper", tmp_path, mixed=True, text=text_of("sd3"))


def search_is_the_papers(
    found: Case,
    threshold: float,
    loss: str,
    folder: Path,
    *,
    mixed: bool,
    text: dict[str, tuple[int, int]] | None = None,
) -> None:
    calls = found.generation(STEPS, afresh=True)
    plan = calibrated(found, calls, folder, threshold=threshold, loss=loss)
    rows, losses, _ = plain_search(
        found.model,
        calls,
        found.sites,
        threshold=threshold,
        loss=loss_named(loss),
        window=8,
        cfg=plan.cfg,
        tensor_of=tensor_of,
        text=text,
    )
    assert plan.cfg == found.cfg_order
    assert [[m.value for m in row] for row in plan.methods] == rows
    for ours, theirs in zip(plan.provenance["calibration"]["losses"], losses, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert dict(mine) == pytest.approx(other, rel=1e-3, abs=2e-6)
    if mixed:
        assert len({m for row in rows for m in row}) > 2


def mixed(cache: Path, **settings: Any) -> Plan:
    """A calibration of the small DiT whose plan uses several methods."""
    found = dit(layers=3)
    return calibrated(found, found.generation(STEPS), cache, **{"threshold": 0.3, **settings})


def test_a_finished_search_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = mixed(tmp_path)
    monkeypatch.setattr(Greedy, "step", None)
    assert mixed(tmp_path) == first
    with pytest.raises(TypeError):
        mixed(tmp_path, resume=False)
    with pytest.raises(TypeError):
        mixed(tmp_path, threshold=0.31)


class KilledError(BaseException):
    """Stands for a SIGKILL between two writes."""


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_killed_search_goes_on_and_ends_with_the_same_plan(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = mixed(tmp_path / "whole")
    kept = Record.keep
    monkeypatch.setattr(Record, "keep", lambda self, **found: (kept(self, **found), _die(len(found["rows"]), after)))
    with pytest.raises(KilledError):
        mixed(tmp_path / "killed")
    monkeypatch.setattr(Record, "keep", kept)
    searched: list[int] = []
    search = Greedy._search
    monkeypatch.setattr(
        Greedy,
        "_search",
        lambda self, graph, step, frontier: searched.append(step) or search(self, graph, step, frontier),
    )
    again = mixed(tmp_path / "killed")
    assert searched == list(range(after, STEPS))
    assert _without_calls(again) == _without_calls(whole)


def _die(rows: int, after: int) -> None:
    if rows == after:
        raise KilledError


def _without_calls(plan: Plan) -> Plan:
    calibration = {k: v for k, v in plan.provenance["calibration"].items() if k != "calls"}
    return plan.replace(provenance={"calibration": calibration})


def test_a_damaged_record_is_begun_anew(tmp_path: Path) -> None:
    first = mixed(tmp_path)
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text()[:100])
    assert mixed(tmp_path) == first


def test_a_full_disk_is_a_typed_error_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(PlanFileError, match="No space left"):
        mixed(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:the plan is measured at")  # on a busy machine
@pytest.mark.parametrize("goal", [{"target_flops": 0.5}, {"target_speedup": 1.02}])
def test_a_budget_is_kept(goal: dict[str, float], tmp_path: Path) -> None:
    found = dit(layers=3, sample_size=16)
    plan = calibrated(found, found.generation(STEPS), tmp_path, threshold=None, verify=1, **goal)
    calibration = plan.provenance["calibration"]
    predicted = calibration["predicted"]
    assert predicted["least_error"] <= predicted["error"]
    if "target_flops" in goal:
        assert predicted["flops_kept"] <= 0.5 + 1e-6
        assert {m.value for row in plan.methods for m in row} > {"full"}
    assert calibration["measured"]["speed_up"] > 0
    assert len(calibration["drift"]) == STEPS and calibration["drift"][0] == 0
    assert len(calibration["step_seconds"]["plan"]) == STEPS
    assert calibrated(found, found.generation(STEPS), tmp_path, threshold=None, verify=1, **goal) == plan


def test_other_budgets_use_the_same_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = dit(layers=2)
    calls = found.generation(STEPS)
    calibrated(found, calls, tmp_path, target_flops=0.6)
    tried: list[str] = []
    complete = SearchGraph.complete
    monkeypatch.setattr(SearchGraph, "complete", lambda self, f: tried.append("") or complete(self, f))
    looser = calibrated(found, calls, tmp_path, target_flops=0.8)
    assert not tried  # every trial ends with a `complete`
    assert looser.provenance["calibration"]["predicted"]["flops_kept"] <= 0.8


def test_what_was_found_belongs_to_versions_and_for_seconds_to_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dit(layers=2)
    calls = found.generation(STEPS)
    goals: list[dict[str, Any]] = [{"threshold": 0.3}, {"target_flops": 0.6}]

    def fingerprints() -> list[str]:
        plans = [calibrated(found, calls, tmp_path, **goal) for goal in goals]
        return [plan.provenance["calibration"]["fingerprint"] for plan in plans]

    here = fingerprints()
    monkeypatch.setattr(difa_fx.calibration, "hardware", lambda: {"cpu": "another"})
    elsewhere = fingerprints()
    assert elsewhere[0] == here[0] and elsewhere[1] != here[1]
    monkeypatch.setattr(difa_fx.calibration, "versions", lambda: {"difa_fx": "another"})
    assert not set(fingerprints()) & {*here, *elsewhere}


@pytest.mark.parametrize("goal", [{"target_flops": 0.01}, {"target_speedup": 50.0}])
def test_a_target_out_of_reach_names_the_best(goal: dict[str, float], tmp_path: Path) -> None:
    found = dit(layers=2)
    with pytest.raises(CalibrationError, match="every step but the first at the cheapest method"):
        calibrated(found, found.generation(STEPS), tmp_path, **goal)


def test_all_full_says_what_would_have_helped(tmp_path: Path) -> None:
    found = dit(layers=2)
    with pytest.warns(UserWarning, match="full attention everywhere") as caught:
        plan = calibrated(found, found.generation(STEPS), tmp_path, threshold=1e-9, progress=True)
    assert {m.value for row in plan.methods for m in row} == {"full"}
    threshold, step, site, method = first_admitting_threshold(plan)
    assert f"{threshold:.4g}" in str(caught[0].message) or f"{threshold:.3g}" in str(caught[0].message)
    looser = calibrated(found, found.generation(STEPS), tmp_path, threshold=threshold * 1.0001)
    assert looser.at(step)[site].value == method


def test_losses_must_be_finite(tmp_path: Path) -> None:
    found = dit(layers=2)
    calls = found.generation(STEPS)
    calls[2][0][0].fill_(float("nan"))
    with pytest.raises(CalibrationError, match="not a finite number") as caught:
        calibrated(found, calls, tmp_path, threshold=0.1)
    assert "step 2" in str(caught.value.where)


def test_wrong_arguments_are_typed_errors(tmp_path: Path) -> None:
    found = dit(layers=2)
    calls = found.generation(2)

    def fails(kind: type[DifaError], match: str, **settings: Any) -> None:
        with pytest.raises(kind, match=match):
            calibrated(found, calls, tmp_path, **settings)

    fails(CalibrationError, "one goal")
    fails(CalibrationError, "one goal", threshold=0.1, target_flops=0.5)
    fails(CalibrationError, "out of range", target_speedup=0.5)
    fails(CalibrationError, "out of range", target_flops="half")
    fails(PlanError, "candidates", threshold=0.1, candidates=["cached", "windw"])
    fails(CalibrationError, "no candidate", threshold=0.1, candidates=["full"])
    fails(OptionError, "loss", threshold=0.1, loss="lpips")
    fails(OptionError, "compiler", threshold=0.1, compiler="inductr")
    fails(CalibrationError, "order of the CFG halves", threshold=0.1, cfg="first")
    with pytest.raises(CalibrationError, match="no samples"):
        difa_fx.calibrate(found.model, [], num_inference_steps=2, threshold=0.1, sampler=sampler(calls))
    with pytest.raises(PlanError, match="num_inference_steps"):
        difa_fx.calibrate(found.model, [0], num_inference_steps=0, threshold=0.1, sampler=sampler(calls))
    with pytest.raises(CalibrationError, match="without a sampler"):
        difa_fx.calibrate(found.model, [0], num_inference_steps=2, threshold=0.1, cache_dir=tmp_path)
    with pytest.raises(CalibrationError, match="another number of times"):
        difa_fx.calibrate(
            found.model,
            [0],
            num_inference_steps=3,
            threshold=0.1,
            sampler=sampler(calls),
            cache_dir=tmp_path,
            compiler="eager",
        )


def test_a_denoiser_without_a_site(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no self-attention"):
        difa_fx.calibrate(
            nn.Linear(4, 4),
            [0],
            num_inference_steps=1,
            threshold=0.1,
            sampler=lambda model, _: model(torch.zeros(2, 4)),
            cache_dir=tmp_path,
            compiler="eager",
        )


def test_the_denoiser_is_left_as_it_was(tmp_path: Path) -> None:
    found = dit(layers=2)
    calls = found.generation(2)
    before = tensor_of(found.model(*calls[0][0], **calls[0][1]))
    calibrated(found, calls, tmp_path, threshold=0.1)
    assert found.model._compiled_call_impl is None
    assert torch.equal(before, tensor_of(found.model(*calls[0][0], **calls[0][1])))


def test_one_sample_does_not_tell_the_cfg_order(tmp_path: Path) -> None:
    found = dit(layers=2)
    calls = found.generation(2, batch=2)
    with pytest.raises(CalibrationError, match="conditional one cannot be told"):
        calibrated(found, calls, tmp_path, threshold=0.1)
    assert calibrated(found, calls, tmp_path, threshold=0.1, cfg="cond_first").cfg == "cond_first"
    without = calibrated(found, calls, tmp_path, threshold=0.5, cfg=None)
    assert without.cfg is None and not without.uses_cfg


def test_without_guidance_nothing_shares_a_half(tmp_path: Path) -> None:
    found = case("toy_odd_batch")
    plan = calibrated(found, found.generation(3), tmp_path, threshold=0.5)
    assert plan.cfg is None and not plan.uses_cfg


def dit_pipeline() -> DiTPipeline:
    """A tiny pipeline with random weights."""
    torch.manual_seed(0)
    denoiser = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        sample_size=8,
        patch_size=1,
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=1000,
    )
    pipe = DiTPipeline(transformer=wake(denoiser).eval(), vae=PixelVAE(), scheduler=DPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pipeline_is_calibrated(tmp_path: Path) -> None:
    pipe = dit_pipeline()
    plan = difa_fx.calibrate(
        pipe,
        [1, 2],
        num_inference_steps=3,
        threshold=0.5,
        window=8,
        guidance_scale=2.0,
        pipeline_kwargs={"output_type": "np"},
        cache_dir=tmp_path,
        compiler="eager",
        progress=False,
    )
    assert plan.cfg == "cond_first" and plan.steps == 3 and plan.timesteps is not None
    assert "drift" in plan.provenance["calibration"]["measured"]
    difa_fx.attach(pipe, plan, compiler="eager")
    pipe([1, 2], num_inference_steps=3, output_type="np")
    difa_fx.detach(pipe)
    with pytest.raises(OptionError, match="does not take"):
        difa_fx.calibrate(pipe, [1], num_inference_steps=3, threshold=0.5, negative_prompt="no", cache_dir=tmp_path)


JUNK = [
    ("rows", [["bogus", "full"]]),
    ("rows", [["full"]]),
    ("losses", 3),
    ("plan", 3),
    ("plan", {"format": "difa.plan"}),
]


@pytest.mark.parametrize(("name", "value"), JUNK)
def test_a_record_that_is_not_as_it_was_written_begins_anew(name: str, value: object, tmp_path: Path) -> None:
    found = case("toy_three_blocks")
    calls = found.generation(3, afresh=True)
    plan = calibrated(found, calls, tmp_path, threshold=0.3)
    for path in tmp_path.glob("*.json"):
        content = json.loads(path.read_text())
        content["found"].pop("plan", None)
        content["found"][name] = value
        path.write_text(json.dumps(content))
    assert calibrated(found, calls, tmp_path, threshold=0.3) == plan
