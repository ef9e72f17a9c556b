"""Calibration where a sampler calls the denoiser twice a step: the plan is that of the same guidance in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import compiled
from models import Case, dit, relative, tensor_of
from test_guidance import TwoCalls, run_calls
from torch import Tensor, nn
from zoo_video_pipelines import VIDEO_PIPELINES

import difa_fx
from difa_fx.errors import CalibrationError
from difa_fx.plan import Plan

STEPS = 4
LABELS = torch.tensor([1, 2, 10, 10])
"""Two conditional samples, and no class twice."""


def generation(found: Case) -> list[Any]:
    """A generation's calls with both halves in one batch, and the same classes at every step."""
    return [(args, kwargs | {"class_labels": LABELS}) for args, kwargs in found.generation(STEPS)]


def halves(calls: Sequence[Any]) -> list[tuple[Any, Any]]:
    """The same as two calls a step."""

    def half(values: Any, part: int) -> Any:
        return [v.chunk(2)[part] if isinstance(v, Tensor) else v for v in values]

    def call(args: Any, kwargs: Any, part: int) -> Any:
        return half(args, part), dict(zip(kwargs, half(kwargs.values(), part), strict=True))

    return [(call(*c, 0), call(*c, 1)) for c in calls]


def calibrated(found: Case, calls: Sequence[Any], cache: Path, **settings: Any) -> Plan:
    def sample(model: nn.Module, samples: Sequence[Any]) -> Tensor:
        return [tensor_of(model(*args, **kwargs)).clone() for args, kwargs in calls][-1]

    settings = {"threshold": 0.12, "window": 8, "verify": 0, **settings}
    return difa_fx.calibrate(
        found.model,
        [0] * 2,
        num_inference_steps=STEPS,
        sampler=sample,
        compiler="eager",
        progress=False,
        cache_dir=cache,
        **settings,
    )


def in_order(pairs: Sequence[tuple[Any, Any]], *, first: int = 0) -> list[Any]:
    return [pair[part] for pair in pairs for part in (first, 1 - first)]


def test_the_plan_of_two_calls_is_that_of_one_batch(tmp_path: Path) -> None:
    found = dit(layers=3)
    calls = generation(found)
    batched = calibrated(found, calls, tmp_path / "one")
    plan = calibrated(found, in_order(halves(calls)), tmp_path / "two")
    assert (batched.cfg, plan.cfg) == ("cond_first", "cond_call_first")
    assert plan.methods == batched.methods
    assert len({m for row in plan.methods for m in row}) > 2, plan.methods
    for ours, theirs in zip(*(p.provenance["calibration"]["losses"] for p in (plan, batched)), strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert dict(mine) == pytest.approx(other, rel=1e-3)
    got = run_calls(compiled(found, plan, "eager"), halves(calls))
    for output, expected in zip(got, TwoCalls(found, plan).run(halves(calls)), strict=True):
        assert relative(output, expected) < 1e-4


@pytest.mark.parametrize("cfg", ["auto", None])
def test_an_unconditional_call_that_comes_first_shares_nothing(cfg: str | None, tmp_path: Path) -> None:
    found = dit()
    plan = calibrated(found, in_order(halves(generation(found)), first=1), tmp_path, cfg=cfg)
    assert plan.cfg == ("uncond_call_first" if cfg else "cond_call_first")
    assert not plan.uses_cfg
    assert len({m for row in plan.methods for m in row}) > 1


def test_a_budget_and_what_it_measures(tmp_path: Path) -> None:
    found = dit()
    calls = in_order(halves(generation(found)))
    plan = calibrated(found, calls, tmp_path, threshold=None, target_flops=0.6, verify=1)
    findings = plan.provenance["calibration"]
    assert findings["predicted"]["flops_kept"] <= 0.6
    assert len(findings["step_seconds"]["plan"]) == STEPS
    assert len(findings["drift"]) == STEPS
    assert findings["drift"][1] < findings["drift"][-1] or findings["drift"][-1] == 0


def test_the_order_of_two_single_samples_cannot_be_told(tmp_path: Path) -> None:
    found = dit()
    single = [(([a[0][:1]], {k: v[:1] for k, v in kw.items()})) for pair in halves(generation(found)) for a, kw in pair]
    with pytest.raises(CalibrationError, match="cannot be told"):
        calibrated(found, single, tmp_path)
    assert calibrated(found, single, tmp_path, cfg="cond_call_first").cfg == "cond_call_first"


def test_conditions_that_change_from_step_to_step_are_refused(tmp_path: Path) -> None:
    found = dit()
    calls = in_order(halves(generation(found)))
    calls[3] = (calls[3][0], calls[3][1] | {"class_labels": torch.tensor([3, 3])})
    with pytest.raises(CalibrationError, match="other inputs than it had at the first step"):
        calibrated(found, calls, tmp_path)


def test_a_real_pipeline_of_two_calls(tmp_path: Path) -> None:
    found = VIDEO_PIPELINES["wan"]()
    plan = difa_fx.calibrate(
        getattr(found.pipe, found.denoiser_name),
        [0],
        num_inference_steps=4,
        threshold=0.5,
        window=5,
        cfg="cond_call_first",
        sampler=lambda model, samples: found.run(4),
        compiler="eager",
        verify=1,
        progress=False,
        cache_dir=tmp_path,
    )
    assert plan.sites == found.case.sites
    assert len({m for row in plan.methods for m in row}) > 1
    difa_fx.attach(found.pipe, plan, compiler="eager")
    assert torch.isfinite(found.run(4)).all()
