"""Guidance in other ways than one batch of two halves throughout: two calls a step, and an end in the middle."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from compiled import compiled, make_plan, run, runner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import Case, dit, relative, tensor_of, toy
from oracle import Oracle, OracleError
from thorough import cases
from torch import Tensor

import difa_fx
from difa_fx import registry
from difa_fx.errors import CFGError, ClockError, PlanError
from difa_fx.plan import Method, Plan

TIGHT = 1e-4
ALONE = {"full+cfg": "full", "window+cfg": "window"}


def halves(found: Case, steps: int, seed: int = 0) -> list[tuple[Any, Any]]:
    """The conditional and the unconditional call of every step: the halves of a batched generation."""
    calls = []
    for args, kwargs in found.generation(steps, seed=seed):
        batch = args[0].shape[0]

        def half(value: Any, part: int, batch: int = batch) -> Any:
            return value.chunk(2)[part] if isinstance(value, Tensor) and value.shape[:1] == (batch,) else value

        def call(part: int, args: Any = args, kwargs: Any = kwargs, half: Any = half) -> Any:
            return tuple(half(a, part) for a in args), {k: half(v, part) for k, v in kwargs.items()}

        calls.append((call(0), call(1)))
    return calls


class TwoCalls:
    """The oracle of two calls a step: one for each half, and a site that shares gives what the first gave."""

    def __init__(self, found: Case, plan: Plan) -> None:
        alone = [[ALONE.get(m.value, m.value) for m in row] for row in plan.methods]
        self.first = Oracle(found.model, dataclasses.replace(plan, methods=alone))
        self.second = Oracle(found.model, dataclasses.replace(plan, methods=alone))
        self.plan = plan

    def run(self, calls: list[tuple[Any, Any]]) -> list[Tensor]:
        outputs = []
        for step, ((cond, cond_kw), (uncond, uncond_kw)) in enumerate(calls):
            outputs.append(tensor_of(self.first(step, *cond, **cond_kw)))
            shared = [s for s, m in zip(self.plan.sites, self.plan.methods[step], strict=True) if m.shares_cfg]
            refreshed = [s for s in shared if self.plan.at(step)[s].refreshes]
            outputs.append(tensor_of(self._second(step, shared, refreshed, uncond, uncond_kw)))
        return outputs

    def _second(self, step: int, shared: list[str], refreshed: list[str], args: Any, kwargs: Any) -> Any:
        """The second call: shared sites are cached ones whose y is the first call's, and so is r after a refresh."""
        rows = [list(row) for row in self.second.plan.methods]
        before = rows[step]
        rows[step] = [Method.CACHED if site in shared else m for site, m in zip(self.plan.sites, before, strict=True)]
        for site in shared:
            self.second.outputs[site] = self.first.outputs[site].clone()
        for site in refreshed:
            self.second.residuals[site] = self.first.residuals[site].clone()

        class Row:
            sites, methods, window, cfg = self.plan.sites, rows, self.plan.window, self.plan.cfg

        self.second.plan = Row
        return self.second(step, *args, **kwargs)


def run_calls(model: Any, calls: list[tuple[Any, Any]]) -> list[Tensor]:
    difa_fx.reset(model)
    return [tensor_of(model(*args, **kwargs)).clone() for pair in calls for args, kwargs in pair]


ROWS = ["full", "window+cfg", "cached", "full+cfg", "window", "cached", "window+cfg", "full", "window+cfg", "window"]


@pytest.mark.parametrize("build", [dit, toy])
def test_two_calls_a_step_agree_with_the_oracle(build: Any) -> None:
    found = build()
    plan = make_plan(found, ROWS, window=5, cfg="cond_call_first")
    model = compiled(found, plan, "eager")
    calls = halves(found, plan.steps)
    for _ in range(2):
        got = run_calls(model, calls)
        for call, (ours, theirs) in enumerate(zip(got, TwoCalls(found, plan).run(calls), strict=True)):
            assert relative(ours, theirs) < TIGHT, f"call {call}: {ROWS[call // 2]}"


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_two_calls_a_step_agree_with_the_oracle_on_random_plans(data: st.DataObject) -> None:
    found = toy()
    row = st.lists(st.sampled_from([m.value for m in Method]), min_size=2, max_size=2)
    rows = ["full", *(data.draw(row) for _ in range(data.draw(st.integers(2, 5))))]
    plan = make_plan(found, rows, window=data.draw(st.integers(0, 50)), cfg="cond_call_first")
    calls = halves(found, plan.steps)
    torch._dynamo.reset()
    got = run_calls(compiled(found, plan, "eager"), calls)
    for call, (ours, theirs) in enumerate(zip(got, TwoCalls(found, plan).run(calls), strict=True)):
        assert relative(ours, theirs) < TIGHT, f"call {call} of {plan.methods}"


def test_state_of_two_calls_is_what_the_schedule_predicts() -> None:
    found = dit()
    model = compiled(found, make_plan(found, ROWS, cfg="cond_call_first"), "eager")
    held = []
    difa_fx.reset(model)
    for pair in halves(found, len(ROWS)):
        for args, kwargs in pair:
            model(*args, **kwargs)
            held.append(runner(model).stats.state_bytes)
    assert tuple(held) == runner(model).stats.predicted_state_bytes
    assert held[0] > 0
    assert held[-1] == 0


def test_one_call_a_step_where_two_are_expected_is_an_error() -> None:
    found = dit()
    model = compiled(found, make_plan(found, ["full", "cached", "cached"], cfg="cond_call_first"), "eager")
    (first, _), (second, _), _ = halves(found, 3)
    model(*first[0], **first[1])
    with pytest.raises(ClockError, match="two calls a step"):
        model(*second[0], **second[1])


def test_the_unconditional_call_cannot_share_when_it_comes_first() -> None:
    found = dit()
    with pytest.raises(PlanError, match="unconditional call comes first"):
        make_plan(found, ["full", "full+cfg"], cfg="uncond_call_first")
    plan = make_plan(found, ["full", "cached", "window"], cfg="uncond_call_first")
    calls = [(uncond, cond) for cond, uncond in halves(found, 3)]
    got = run_calls(compiled(found, plan, "eager"), calls)
    for ours, theirs in zip(got, TwoCalls(found, plan).run(calls), strict=True):
        assert relative(ours, theirs) < TIGHT


@pytest.mark.parametrize("order", ["cond_first", "uncond_first"])
@pytest.mark.parametrize("stop", cases(range(1, 8), core={1, 4}))
def test_guidance_may_end_in_the_middle(order: str, stop: int) -> None:
    """From ``stop`` on the batch is the conditional half alone, and goes on with that half of the state."""
    found = dit(cfg_order=order)
    rows = ["full", "window+cfg", "cached", "full+cfg", "window", "cached", "window+cfg", "cached", "window"]
    plan = make_plan(found, rows, window=5)
    part = 1 if order == "uncond_first" else 0
    calls = found.generation(plan.steps)
    single = [pair[part] for pair in halves(found, plan.steps)]
    oracle = Oracle(found.model, plan)
    model = compiled(found, plan, "eager")
    for _ in range(2):
        oracle.reset()
        difa_fx.reset(model)
        for step in range(plan.steps):
            args, kwargs = calls[step] if step < stop else single[step]
            ours = tensor_of(model(*args, **kwargs))
            args, kwargs = calls[step]
            theirs = tensor_of(oracle(step, *args, **kwargs))
            if step < stop:
                assert relative(ours, theirs) < TIGHT, f"step {step}"
            else:
                assert relative(ours, theirs.chunk(2)[part]) < TIGHT, f"step {step}"
        assert sum(stats.state_bytes for stats in difa_fx.stats(model)) == 0


def test_guidance_cannot_come_back() -> None:
    """What the unconditional half would go on with was not computed: never a stale tensor."""
    found = dit()
    model = compiled(found, make_plan(found, ["full", "cached", "cached", "cached"]), "eager")
    calls, single = found.generation(4), [pair[0] for pair in halves(found, 4)]
    for args, kwargs in (calls[0], single[1]):
        model(*args, **kwargs)
    with pytest.raises(ClockError, match="no state to go on with"):
        model(*calls[2][0], **calls[2][1])


def test_state_of_another_dtype_is_not_taken_over() -> None:
    found = dit()
    found.model.to(torch.bfloat16)
    model = compiled(found, make_plan(found, ["full", "cached"]), "eager")
    (first, kwargs), (second, later) = found.generation(2)
    difa_fx.reset(model)
    model(first[0].bfloat16(), **kwargs)
    found.model.to(torch.float16)
    with pytest.raises(ClockError, match="no state to go on with"):
        model(second[0].half(), **later)


def test_a_generation_without_guidance_is_not_taken_for_its_end() -> None:
    found = dit()
    model = compiled(found, make_plan(found, ["full", "full+cfg"]), "eager")
    (first, _), _ = halves(found, 2)
    with pytest.raises(CFGError, match="different latents"):
        model(*first[0], **first[1])


def test_the_oracle_of_two_calls_can_fail() -> None:
    found = toy()
    plan = make_plan(found, ["full", "cached"], window=5, cfg="cond_call_first")
    other = make_plan(found, ["full", "window"], window=5, cfg="cond_call_first")
    calls = halves(found, 2)
    got = run_calls(compiled(found, plan, "eager"), calls)
    assert relative(got[3], TwoCalls(found, other).run(calls)[3]) > 1e-3
    with pytest.raises(OracleError):
        TwoCalls(found, plan).first(7, *calls[0][0][0])


def test_plain_batches_keep_their_runners() -> None:
    """Another batch is another runner, each with its own state, in generations of their own."""
    found = dit()
    plan = make_plan(found, ["full", "cached", "window"])
    model = compiled(found, plan, "eager")
    for batch in (4, 2, 4):
        calls = found.generation(3, batch=batch)
        got = run(model, calls)
        for ours, theirs in zip(got, Oracle(found.model, plan).run(calls), strict=True):
            assert relative(ours, tensor_of(theirs)) < TIGHT
    assert len(registry.runners(model)) == 2
