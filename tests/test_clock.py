"""State never outlives its generation: the clock by itself, and denoisers interrupted, probed, shared."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from compiled import compiled, make_plan, run, runner
from models import Case, dit, relative, tensor_of, toy

import difa_fx
from difa_fx import registry
from difa_fx.clock import Clock
from difa_fx.errors import CFGError, ClockError, SiteError

ROWS = ["full", "cached", "window", "full", "cached"]
TIMES = [999, 799, 599, 399, 199]
"""What ``Case.generation(5)`` shows the denoiser."""


def ticks(clock: Clock, times: list[float]) -> list[int]:
    return [clock.tick(t) for t in times]


def test_known_timesteps_are_followed_and_begin_again() -> None:
    clock = Clock(3, (30.0, 20.0, 10.0))
    assert ticks(clock, [30, 20, 10, 30, 20, 30, 20, 10]) == [0, 1, 2, 0, 1, 0, 1, 2]


@pytest.mark.parametrize("times", [[20], [30, 10], [30, 20, 20], [30, 20, 10, 5], [30, 25]])
def test_an_unexpected_timestep_is_an_error(times: list[float]) -> None:
    clock = Clock(3, (30.0, 20.0, 10.0))
    with pytest.raises(ClockError, match="timestep"):
        ticks(clock, times)


def test_an_attached_clock_begins_when_it_is_told_to() -> None:
    clock = Clock(2)
    clock.begin([5, 4])
    assert ticks(clock, [5, 4]) == [0, 1]
    with pytest.raises(ClockError):
        clock.tick(5)
    clock.begin([7, 6])
    assert ticks(clock, [7, 6]) == [0, 1]


def test_a_heun_sampler_repeats_timesteps() -> None:
    clock = Clock(5, (9.0, 5.0, 5.0, 1.0, 1.0))
    assert ticks(clock, [9, 5, 5, 1, 1, 9]) == [0, 1, 2, 3, 4, 0]


def test_unknown_timesteps_are_learned() -> None:
    clock = Clock(3)
    assert ticks(clock, [9, 6, 3, 9, 6]) == [0, 1, 2, 0, 1]
    with pytest.raises(ClockError):
        clock.tick(5)


def test_unknown_timesteps_jump_back_to_begin() -> None:
    clock = Clock(4)
    assert ticks(clock, [9, 6, 8, 5, 4, 2]) == [0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize("times", [[9, 6, 6], [9, 6, 3, 1]])
def test_unknown_timesteps_that_repeat_or_run_on_are_errors(times: list[float]) -> None:
    with pytest.raises(ClockError):
        ticks(Clock(3), times)


def test_without_timesteps_every_generation_is_announced() -> None:
    clock = Clock(2)
    with pytest.raises(ClockError, match="reset"):
        clock.tick(None)
    clock.begin()
    assert [clock.tick(None), clock.tick(None)] == [0, 1]
    with pytest.raises(ClockError):
        clock.tick(None)


def test_a_timestep_is_compared_in_its_own_precision() -> None:
    expected = (951.0, 902.0)
    rounded = [float(torch.tensor(t, dtype=torch.bfloat16)) for t in expected]
    clock = Clock(2, expected)
    assert [clock.tick(t, tolerance=torch.finfo(torch.bfloat16).eps) for t in rounded] == [0, 1]


def outputs(model: Any, calls: list[Any]) -> list[torch.Tensor]:
    """The outputs of calls, without a reset before them."""
    return [tensor_of(model(*args, **kwargs)).clone() for args, kwargs in calls]


@pytest.mark.parametrize("timesteps", [TIMES, None])
@pytest.mark.parametrize("stopped_after", [1, 2, 4])
def test_an_interrupted_generation_leaves_nothing(stopped_after: int, timesteps: list[int] | None) -> None:
    found = dit(layers=2)
    plan = make_plan(found, ROWS, timesteps=timesteps)
    fresh = outputs(compiled(found, plan, "eager"), found.generation(5, seed=1))
    torch._dynamo.reset()
    model = compiled(found, plan, "eager")
    outputs(model, found.generation(5, seed=7)[:stopped_after])
    again = outputs(model, found.generation(5, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(fresh, again, strict=True))


@pytest.mark.parametrize("dynamic", [None, False])
def test_another_batch_size_in_the_middle_of_things(dynamic: bool | None) -> None:
    found = dit(layers=2)
    plan = make_plan(found, ROWS)
    fresh = outputs(compiled(found, plan, "eager"), found.generation(5, batch=6, seed=1))
    torch._dynamo.reset()
    options = {"plan": plan, "compiler": "eager"}
    model = torch.compile(found.model, backend="difa", options=options, dynamic=dynamic)
    outputs(model, found.generation(5, batch=4)[:3])
    again = outputs(model, found.generation(5, batch=6, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(fresh, again, strict=True))
    args, kwargs = found.generation(5, batch=4)[0]
    assert relative(outputs(model, [(args, kwargs)])[0], tensor_of(found.model(*args, **kwargs))) < 1e-5


def test_another_batch_size_within_a_generation_is_an_error() -> None:
    found = dit(layers=2)
    model = compiled(found, make_plan(found, ROWS), "eager")
    outputs(model, found.generation(5, batch=4)[:2])
    with pytest.raises(ClockError, match="no state to go on with"):
        outputs(model, found.generation(5, batch=6)[2:])


def test_another_resolution() -> None:
    found = toy()
    found.model.position = torch.nn.Parameter(found.model.position[:1].clone())
    wider = replace(toy(tokens=found.tokens * 2), model=found.model)
    plan = make_plan(found, ROWS)
    fresh = outputs(compiled(wider, plan, "eager"), wider.generation(5, seed=1))
    torch._dynamo.reset()
    model = torch.compile(found.model, backend="difa", options={"plan": plan, "compiler": "eager"})
    outputs(model, found.generation(5)[:3])
    again = outputs(model, wider.generation(5, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(fresh, again, strict=True))


def test_two_denoisers_of_one_class_do_not_share_state() -> None:
    found = dit(layers=2)
    other = replace(found, model=copy.deepcopy(found.model))
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.1)
    plan = make_plan(found, ROWS)
    options = {"plan": plan, "compiler": "eager"}
    alone = []
    for one in (found, other):
        torch._dynamo.reset()
        alone.append(outputs(torch.compile(one.model, backend="difa", options=options), one.generation(5)))
    torch._dynamo.reset()
    pair = [torch.compile(one.model, backend="difa", options=options) for one in (found, other)]
    for step, call in enumerate(found.generation(5)):
        for model, expected in zip(pair, alone, strict=True):
            assert torch.equal(outputs(model, [call])[0], expected[step])


def test_a_probe_before_a_generation_is_harmless() -> None:
    found = dit(layers=2)
    plan = make_plan(found, ROWS, timesteps=TIMES)
    calls = found.generation(5)
    fresh = outputs(compiled(found, plan, "eager"), calls)
    torch._dynamo.reset()
    model = compiled(found, plan, "eager")
    outputs(model, found.generation(5, seed=3)[:1])
    assert torch.equal(outputs(model, calls)[-1], fresh[-1])


def test_a_probe_within_a_generation_cannot_go_unseen() -> None:
    found = dit(layers=2)
    model = compiled(found, make_plan(found, ROWS, timesteps=TIMES), "eager")
    calls = found.generation(5)
    outputs(model, calls[:2])
    outputs(model, calls[2:3])
    with pytest.raises(ClockError):
        outputs(model, calls[2:3])
    assert runner(model).stats.state_bytes == 0


def test_a_call_that_fails_ends_its_generation() -> None:
    found = dit(layers=2)
    model = compiled(found, make_plan(found, ROWS), "eager")
    calls = found.generation(5)
    outputs(model, calls[:1])
    program = runner(model).programs[1]

    def fail(*_: Any) -> Any:
        raise MemoryError

    broken = [replace(call, run=fail) if call.run and i else call for i, call in enumerate(program)]
    runner(model).programs = (runner(model).programs[0], tuple(broken), *runner(model).programs[2:])
    with pytest.raises(MemoryError):
        outputs(model, calls[1:2])
    assert runner(model).stats.state_bytes == 0
    with pytest.raises(ClockError, match="no state to go on with"):
        outputs(model, calls[2:3])


def test_a_generation_of_another_length_is_an_error() -> None:
    found = dit(layers=2)
    model = compiled(found, make_plan(found, ROWS, timesteps=TIMES), "eager")
    with pytest.raises(ClockError):
        outputs(model, found.generation(10))


def without_cfg(found: Case) -> Case:
    """The same denoiser called with a batch of different latents."""
    return replace(found, cfg_order=None)


def test_a_batch_that_is_no_cfg_pair_is_an_error() -> None:
    found = dit(layers=2)
    plan = make_plan(found, ["full", "full+cfg"])
    with pytest.raises(CFGError, match="two halves"):
        outputs(compiled(found, plan, "eager"), without_cfg(found).generation(2, batch=4))


def test_an_odd_batch_has_no_halves() -> None:
    found = dit(layers=2)
    plan = make_plan(found, ["full", "full+cfg"])
    with pytest.raises(SiteError, match="batch of 3"):
        outputs(compiled(found, plan, "eager"), without_cfg(found).generation(2, batch=3))


def test_not_strict_runs_in_full_and_says_so() -> None:
    found = dit(layers=2)
    model = compiled(found, make_plan(found, ROWS, timesteps=TIMES), "eager", strict=False)
    ((args, kwargs),) = found.generation(5)[3:4]
    with pytest.warns(UserWarning, match="full attention"):
        got = tensor_of(model(*args, **kwargs))
    assert relative(got, tensor_of(found.model(*args, **kwargs))) < 1e-5


def test_reset_drops_the_state() -> None:
    found = dit(layers=2)
    model = compiled(found, make_plan(found, ROWS), "eager")
    outputs(model, found.generation(5)[:1])
    assert runner(model).stats.state_bytes > 0
    difa_fx.reset(model)
    assert runner(model).stats.state_bytes == 0


class Timeless(torch.nn.Module):
    """A denoiser that is not told the time."""

    def __init__(self, found: Case) -> None:
        super().__init__()
        self.inner = found.model

    def forward(self, hidden_states: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        time = torch.full((hidden_states.shape[0],), 500)
        return tensor_of(self.inner(hidden_states, timestep=time, class_labels=class_labels))


def test_without_a_timestep_reset_is_asked_for() -> None:
    found = dit(layers=2)
    sites = tuple(f"inner.{site}" for site in found.sites)
    plan = make_plan(replace(found, sites=sites), ["full", "cached"])
    model = torch.compile(Timeless(found), backend="difa", options={"plan": plan, "compiler": "eager"})
    ((latents,), kwargs), _ = found.generation(2)
    labels = kwargs["class_labels"]
    with pytest.raises(ClockError, match="reset"):
        model(latents, labels)
    difa_fx.reset(model)
    first = model(latents, labels)
    assert relative(model(latents, labels), first) < 1e-5
    with pytest.raises(ClockError, match="reset"):
        model(latents, labels)


def test_dropped_models_leave_no_session() -> None:
    found = dit(layers=2)
    model = compiled(found, make_plan(found, ROWS), "eager")
    run(model, found.generation(5))
    assert len(runner(model).sessions) == 1
    assert registry.runners(dit(layers=2).model) == []
