"""What a user gets wrong is a typed error that says what, where, got, allowed and what to do, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import compiled, make_plan
from models import dit, tensor_of

from difa_fx.errors import DifaError, GradError, OptionError, PlanError, PlanFileError, SiteError

FOUND = dit(layers=2)


def first_call(**options: Any) -> None:
    """Compile and call once."""
    model = torch.compile(FOUND.model, backend="difa", options=options)
    args, kwargs = FOUND.generation(1)[0]
    model(*args, **kwargs)


def raw_plan(**changes: Any) -> dict[str, Any]:
    plan = make_plan(FOUND, ["full", "cached"]).to_dict()
    return plan | changes


FAULTS = {
    "unknown option": ({"plann": 1}, OptionError, ["plann", "plan", "did you mean"]),
    "option of the wrong type": ({"plan": raw_plan(), "strict": "yes"}, OptionError, ["strict", "bool"]),
    "unknown compiler": ({"plan": raw_plan(), "compiler": "gcc"}, OptionError, ["gcc", "inductor"]),
    "unknown kernel": ({"plan": raw_plan(), "window_kernel": "fast"}, OptionError, ["fast", "flex"]),
    "unknown Inductor option": ({"plan": raw_plan(), "inductor": {"max_autotun": True}}, OptionError, ["max_autotune"]),
    "unknown mode": ({"plan": raw_plan(), "mode": "max-autotuned"}, OptionError, ["max-autotuned", "reduce-overhead"]),
    "plan of the wrong type": ({"plan": 3}, PlanError, ["a path, a dict or a Plan"]),
    "unknown method": ({"plan": raw_plan(methods=[["full"] * 2, ["cache"] * 2])}, PlanError, ["cache", "cached"]),
    "unknown site": (
        {"plan": raw_plan(sites=["transformer_blocks.0.attn1", "transformer_blocks.1.atn1"])},
        PlanError,
        ["transformer_blocks.1.atn1", "nearest: transformer_blocks.1.attn1"],
    ),
    "state that was never written": (
        {"plan": raw_plan(methods=[["full", "cached"], ["full", "full"]])},
        PlanError,
        ["step 0", "never written"],
    ),
    "+cfg without an order": (
        {"plan": raw_plan(cfg=None, methods=[["full"] * 2, ["full+cfg"] * 2])},
        PlanError,
        ["cfg"],
    ),
    "wrong type of a field": ({"plan": raw_plan(steps="two")}, PlanError, ["steps", "two"]),
    "wrong type of a method": (
        {"plan": raw_plan(methods=[["full", 3], ["full", "full"]])},
        PlanError,
        ["methods[0][1]"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_typed_error(fault: str) -> None:
    options, kind, words = FAULTS[fault]
    with pytest.raises(kind) as caught:
        first_call(**options)
    assert isinstance(caught.value, DifaError)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "to do: " in message
    assert "got: " in message


@pytest.mark.parametrize("text", ["", "{", '{"format": "difa.plan", "steps": 2', "\x80"])
def test_a_broken_file_is_a_plan_file_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(PlanFileError, match=r"plan\.json"):
        first_call(plan=str(path))


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(100 * 1024 * 1024)
    with pytest.raises(PlanFileError, match=r"large|bytes|MiB"):
        first_call(plan=path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match=r"nowhere\.json"):
        first_call(plan=str(tmp_path / "nowhere.json"))


def test_a_plan_file_works(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(raw_plan()))
    first_call(plan=path, compiler="eager")


def test_gradients_are_refused() -> None:
    with torch.enable_grad(), pytest.raises(GradError, match="no_grad"):
        first_call(plan=raw_plan())


def test_cfg_on_an_odd_batch_is_refused_before_anything_runs() -> None:
    found = dit(layers=2, cfg_order=None)
    plan = make_plan(found, ["full", "full+cfg"], cfg="cond_first")
    args, kwargs = found.generation(1, batch=3)[0]
    with pytest.raises(SiteError, match="full\\+cfg"):
        compiled(found, plan, "eager")(*args, **kwargs)


def test_not_strict_runs_an_impossible_site_in_full() -> None:
    found = dit(layers=2, cfg_order=None)
    plan = make_plan(found, ["full", "full+cfg"], cfg="cond_first")
    model = compiled(found, plan, "eager", strict=False)
    calls = found.generation(2, batch=3)
    with pytest.warns(UserWarning, match="in full"):
        got = [tensor_of(model(*args, **kwargs)) for args, kwargs in calls]
    for output, (args, kwargs) in zip(got, calls, strict=True):
        assert torch.allclose(output, tensor_of(found.model(*args, **kwargs)), atol=1e-5)
