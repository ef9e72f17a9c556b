"""State never outlives its generation: the clock by itself, and denoisers interrupted, probed, shared."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from compiled import compiled, make_plan, run, runner
from models import Case, dit, relative, tensor_of, toy

import difa_fx
from difa_fx import registry
from difa_fx.errors import CFGError, ClockError, SiteError
from difa_fx.generation_line import Told
from difa_fx.generations import Generations
from difa_fx.plan import Plan
from difa_fx.timestep import grid_of

ROWS = ["full", "cached", "window", "full", "cached"]
TIMES = [999, 799, 599, 399, 199]
"""What ``Case.generation(5)`` shows the denoiser."""


def generations(steps: int, timesteps: list[float] | None = None, method: str = "cached") -> Generations:
    """All generations of a denoiser that nobody compiled."""
    rows = [["full"]] + [[method]] * (steps - 1)
    return Generations(
        Plan(sites=["site"], steps=steps, timesteps=timesteps, methods=rows, window=1, cfg=None), lambda _: None
    )


def ticks(clocks: Generations, times: list[float | None], dtype: torch.dtype | None = None) -> list[int]:
    return [clocks.tick(Told(t, grid_of(dtype))).position for t in times]


def test_known_timesteps_are_followed_and_begin_again() -> None:
    assert ticks(generations(3, [30, 20, 10]), [30, 20, 10, 30, 20, 10, 30]) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("times", [[20], [30, 10], [30, 20, 20], [30, 20, 10, 5], [30, 25]])
def test_an_unexpected_timestep_is_an_error(times: list[float]) -> None:
    with pytest.raises(ClockError, match="timestep"):
        ticks(generations(3, [30, 20, 10]), times)


def test_after_one_that_was_cut_short_timesteps_alone_do_not_tell() -> None:
    clocks = generations(3, [30, 20, 10])
    assert ticks(clocks, [30, 30]) == [0, 0]
    with pytest.raises(ClockError, match="cannot be told: another generation was cut short"):
        ticks(clocks, [20])
    clocks.begin()
    assert ticks(clocks, [30, 20, 10]) == [0, 1, 2]


class Scheduler:
    """Stands for one that is heard."""


def test_an_attached_clock_begins_when_it_is_told_to() -> None:
    clocks, mine = generations(2), Scheduler()
    clocks.announce([5, 4], 0.0, mine)
    assert ticks(clocks, [5, 4]) == [0, 1]
    with pytest.raises(ClockError):
        ticks(clocks, [5])
    clocks.announce([7, 6], 0.0, mine)
    assert ticks(clocks, [7, 6]) == [0, 1]


def test_schedulers_that_take_turns_have_each_their_generation() -> None:
    clocks, one, other = generations(3), Scheduler(), Scheduler()
    clocks.announce([9, 6, 3], 0.0, one)
    assert ticks(clocks, [9, 6]) == [0, 1]
    clocks.announce([8, 5, 2], 0.0, other)
    assert ticks(clocks, [8, 3, 5, 2]) == [0, 2, 1, 2]


def test_an_attached_generation_may_begin_in_the_middle() -> None:
    clocks, mine = generations(4), Scheduler()
    clocks.announce([9, 7, 5, 3], 0.0, mine)
    clock = clocks.tick(Told(5))
    assert (clock.first, clock.position, clock.count) == (2, 0, 2)
    assert ticks(clocks, [3]) == [1]
    with pytest.raises(ClockError):
        ticks(clocks, [5])


def test_threads_have_generations_of_their_own() -> None:
    clocks = generations(3, [30, 20, 10])
    assert ticks(clocks, [30, 20]) == [0, 1]
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.extend(ticks(clocks, [30, 20])))
    thread.start()
    thread.join()
    assert found == [0, 1]
    assert ticks(clocks, [10]) == [2]


def test_a_heun_sampler_repeats_timesteps() -> None:
    assert ticks(generations(5, [9, 5, 5, 1, 1]), [9, 5, 5, 1, 1, 9]) == [0, 1, 2, 3, 4, 0]


def test_unknown_timesteps_are_learned() -> None:
    clocks = generations(3)
    clocks.begin()
    assert ticks(clocks, [9, 6, 3, 9, 6]) == [0, 1, 2, 0, 1]
    with pytest.raises(ClockError):
        ticks(clocks, [5])


def test_unknown_timesteps_jump_back_to_begin_and_need_a_proof_to_go_on() -> None:
    clocks = generations(4)
    clocks.begin()
    assert ticks(clocks, [9, 6, 8]) == [0, 1, 0]
    with pytest.raises(ClockError, match="cannot be told"):
        ticks(clocks, [5])


def test_a_step_that_reads_nothing_needs_no_proof() -> None:
    assert ticks(generations(4, method="full"), [9, 8, 7, 6]) == [0, 1, 2, 3]


@pytest.mark.parametrize("times", [[9, 6, 6], [9, 6, 3, 1]])
def test_unknown_timesteps_that_repeat_or_run_on_are_errors(times: list[float]) -> None:
    clocks = generations(3)
    clocks.begin()
    with pytest.raises(ClockError):
        ticks(clocks, times)


def test_without_timesteps_every_generation_is_announced() -> None:
    clocks = generations(2)
    with pytest.raises(ClockError, match="reset"):
        ticks(clocks, [None])
    clocks.begin()
    assert ticks(clocks, [None, None]) == [0, 1]
    with pytest.raises(ClockError):
        ticks(clocks, [None])


@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_a_timestep_is_compared_in_its_own_precision(scale: float) -> None:
    times = [951.0 * scale, 902.0 * scale]
    rounded = [float(torch.tensor(t, dtype=torch.bfloat16)) for t in times]
    assert ticks(generations(2, times), list(rounded), torch.bfloat16) == [0, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_generation_that_begins_again_is_seen_in_half_precision(dtype: torch.dtype) -> None:
    times = [999.0 - 4 * step for step in range(250)]
    first = float(torch.tensor(times[0]).to(dtype))
    assert ticks(generations(250, times), [first, first], dtype) == [0, 0]


def test_steps_that_the_dtype_cannot_tell_apart_need_another_witness() -> None:
    times = [1000.0 - step for step in range(20)]
    shown = [float(torch.tensor(t).bfloat16()) for t in times]
    with pytest.raises(ClockError, match="cannot be told"):
        ticks(generations(20, times), list(shown), torch.bfloat16)
    attached, mine = generations(20), Scheduler()
    attached.announce(times, 0.0, mine)
    assert ticks(attached, list(shown), torch.bfloat16) == list(range(20))


def outputs(model: Any, calls: list[Any]) -> list[torch.Tensor]:
    """The outputs of calls, without a reset before them."""
    return [tensor_of(model(*args, **kwargs)).clone() for args, kwargs in calls]


def steady(found: Case, seed: int, batch: int | None = None) -> list[Any]:
    """A generation as samplers run it: the same conditions at each step, and latents that change a little."""
    (((first,), conditions), *later) = found.generation(5, batch=batch, seed=seed)
    calls = [((first,), conditions)]
    for (noise,), own in later:
        calls.append(((calls[-1][0][0] + 0.2 * noise,), {**conditions, "timestep": own["timestep"]}))
    return calls


@pytest.mark.parametrize("timesteps", [TIMES, None])
@pytest.mark.parametrize("stopped_after", [1, 2, 4])
def test_an_interrupted_generation_leaves_nothing(stopped_after: int, timesteps: list[int] | None) -> None:
    found = dit(layers=2)
    plan = make_plan(found, ROWS, timesteps=timesteps)
    fresh = outputs(compiled(found, plan, "eager"), steady(found, seed=1))
    torch._dynamo.reset()
    model = compiled(found, plan, "eager")
    outputs(model, steady(found, seed=7)[:stopped_after])
    again = outputs(model, steady(found, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(fresh, again, strict=True))


@pytest.mark.parametrize("timesteps", [TIMES, None])
def test_one_that_goes_on_after_another_began_is_refused(timesteps: list[int] | None) -> None:
    found = dit(layers=2)
    model = compiled(found, make_plan(found, ROWS, timesteps=timesteps), "eager")
    one, other = steady(found, seed=1), steady(found, seed=7)
    outputs(model, one[:1])
    outputs(model, other[:1])
    with pytest.raises(ClockError, match="after which another one began"):
        outputs(model, one[1:2])


def test_a_call_with_other_conditions_does_not_go_on() -> None:
    """As a generation that begins lower after one that was cut short, or after a call to warm up."""
    found = dit(layers=2)
    model = compiled(found, make_plan(found, ROWS), "eager")
    outputs(model, steady(found, seed=1)[:1])
    with pytest.raises(ClockError, match="none of its conditions"):
        outputs(model, steady(found, seed=7)[1:2])


@pytest.mark.parametrize("dynamic", [None, False])
def test_another_batch_size_in_the_middle_of_things(dynamic: bool | None) -> None:
    found = dit(layers=2)
    plan = make_plan(found, ROWS)
    fresh = outputs(compiled(found, plan, "eager"), steady(found, batch=6, seed=1))
    torch._dynamo.reset()
    options = {"plan": plan, "compiler": "eager"}
    model = torch.compile(found.model, backend="difa", options=options, dynamic=dynamic)
    outputs(model, steady(found, batch=4, seed=0)[:3])
    again = outputs(model, steady(found, batch=6, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(fresh, again, strict=True))
    args, kwargs = found.generation(5, batch=4)[0]
    assert relative(outputs(model, [(args, kwargs)])[0], tensor_of(found.model(*args, **kwargs))) < 1e-5


def test_another_batch_size_within_a_generation_is_an_error() -> None:
    found = dit(layers=2)
    model = compiled(found, make_plan(found, ROWS), "eager")
    run(model, found.generation(5, batch=4)[:2])
    with pytest.raises(ClockError, match="no state to go on with"):
        outputs(model, found.generation(5, batch=6)[2:])


def test_another_resolution() -> None:
    found = toy()
    found.model.position = torch.nn.Parameter(found.model.position[:1].clone())
    wider = replace(toy(tokens=found.tokens * 2), model=found.model)
    plan = make_plan(found, ROWS)
    fresh = run(compiled(wider, plan, "eager"), wider.generation(5, seed=1))
    torch._dynamo.reset()
    model = torch.compile(found.model, backend="difa", options={"plan": plan, "compiler": "eager"})
    run(model, found.generation(5)[:3])
    again = run(model, wider.generation(5, seed=1))
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
        alone.append(outputs(torch.compile(one.model, backend="difa", options=options), steady(one, seed=0)))
    torch._dynamo.reset()
    pair = [torch.compile(one.model, backend="difa", options=options) for one in (found, other)]
    for step, call in enumerate(steady(found, seed=0)):
        for model, expected in zip(pair, alone, strict=True):
            assert torch.equal(outputs(model, [call])[0], expected[step])


def test_a_probe_before_a_generation_is_harmless() -> None:
    found = dit(layers=2)
    plan = make_plan(found, ROWS, timesteps=TIMES)
    calls = steady(found, seed=0)
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
    run(model, calls[:1])
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
        run(compiled(found, plan, "eager"), without_cfg(found).generation(2, batch=4))


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
