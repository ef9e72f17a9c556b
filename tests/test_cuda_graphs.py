"""Calls as graphs, by a recorder that needs no CUDA: the right numbers, and nothing recorded that need not be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from compiled import compiled, make_plan, run, runner
from models import Case, dit, relative, tensor_of, toy
from oracle import Oracle
from recorders import FakeRecorder
from test_guidance import halves
from test_life import broken
from torch import Tensor

import difa_fx
from difa_fx import backend, registry
from difa_fx.cuda_graphs import StepGraphs
from difa_fx.cuda_recorder import CudaRecorder
from difa_fx.errors import ClockError, GraphError

TIGHT = 1e-4
ROWS = ["full", "window+cfg", "cached", "full+cfg", "window", "cached", "window+cfg", "full", "window", "window"]


class Watched(StepGraphs):
    """Graphs that tell the recorder which state is held."""

    held: dict[Any, Tensor]

    def run(self, call: int, args: Any, state: Any, ahead: Any = None) -> tuple[Any, ...]:
        self.held = state
        return super().run(call, args, state, ahead)


@dataclass(slots=True)
class Place:
    """Where the tests run, and how many graphs were recorded."""

    device: str
    made: int = 0

    def case(self, found: Case) -> Case:
        """``found`` there."""

        def moved(value: Any) -> Any:
            return value.to(self.device) if isinstance(value, Tensor) else value

        def draw(by: Any) -> Any:
            args, kwargs = found.draw(by)
            return tuple(map(moved, args)), {key: moved(value) for key, value in kwargs.items()}

        return replace(found, model=found.model.to(self.device), draw=draw)


@pytest.fixture(params=["fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    """On CUDA as it is; elsewhere with a recorder that stands in for CUDA's."""
    found = Place("cpu" if request.param == "fake" else "cuda")
    recorder = FakeRecorder if request.param == "fake" else CudaRecorder
    record = recorder.record

    def counting(self: Any, run: Any) -> Any:
        found.made += 1
        return record(self, run)

    monkeypatch.setattr(recorder, "record", counting)
    if request.param == "fake":
        monkeypatch.setattr(backend, "graphs_for", watched_graphs)
    return found


def watched_graphs(inputs: Any, fixed: Any) -> Any:
    def make(*args: Any) -> StepGraphs:
        graphs = Watched(*args, fixed=fixed, recorder=lambda: FakeRecorder(lambda: list(graphs.held.values())))
        return graphs

    return make


def recording(found: Case, plan: Any) -> Any:
    return compiled(found, plan, "eager", mode="reduce-overhead", window_kernel="sdpa")


def graphs_of(model: Any) -> StepGraphs:
    (session,) = runner(model).sessions
    assert session.graphs is not None
    return session.graphs


def agree(got: list[Tensor], found: Case, plan: Any, calls: Any) -> None:
    for step, (ours, theirs) in enumerate(zip(got, Oracle(found.model, plan).run(calls), strict=True)):
        assert relative(ours, tensor_of(theirs)) < TIGHT, f"step {step}"


def test_generations_agree_with_the_oracle_and_are_recorded_once(place: Place) -> None:
    found = place.case(dit())
    plan = make_plan(found, ROWS, window=5)
    model = recording(found, plan)
    for generation in range(4):
        calls = found.generation(plan.steps, seed=generation)
        agree(run(model, calls), found, plan, calls)
        recorded = place.made
        assert recorded == (0 if generation == 0 else len(set(graphs_of(model).recorded)))
    assert len(graphs_of(model).recorded) == plan.steps
    assert sum(stats.state_bytes for stats in difa_fx.stats(model)) == 0


def test_calls_that_do_the_same_in_the_same_place_share_a_graph(place: Place) -> None:
    found = place.case(dit())
    rows = ["full", "full+cfg", "cached", "full+cfg", "cached", "full", "window", "window", "window", "full"]
    plan = make_plan(found, rows, window=5)
    model = recording(found, plan)
    for generation in range(4):
        calls = found.generation(plan.steps, seed=generation)
        agree(run(model, calls), found, plan, calls)
    assert graphs_of(model).recorded == (0, 1, 2, 1, 2, 5, 6, 6, 8, 0)


@pytest.mark.parametrize("stops", [(3, 10, 10, 10), (10, 4, 10, 10), (10, 10, 2, 10), (1, 1, 1, 10, 5, 10)])
def test_interrupted_generations(place: Place, stops: tuple[int, ...]) -> None:
    """What a generation that comes further than the one before needs is recorded at last, and is right at once."""
    found = place.case(dit())
    plan = make_plan(found, ROWS, window=5)
    model = recording(found, plan)
    for generation, stop in enumerate((*stops, 10, 10)):
        calls = found.generation(plan.steps, seed=generation)[:stop]
        agree(run(model, calls), found, plan, calls)
    made = place.made
    assert len(graphs_of(model).recorded) == plan.steps
    run(model, calls)
    assert place.made == made


@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize("generation", [1, 2])
def test_parameters_that_move_are_noticed(place: Place, step: int, generation: int) -> None:
    found = place.case(dit())
    plan = make_plan(found, ROWS, window=5)
    model = recording(found, plan)
    calls = found.generation(plan.steps)
    for _ in range(generation):
        run(model, calls)
    expected = [tensor_of(output) for output in Oracle(found.model, plan).run(calls)]
    difa_fx.reset(model)
    for number, (args, kwargs) in enumerate(calls):
        if number == step:
            for parameter in found.model.parameters():
                moved = parameter.detach().clone()
                parameter.data.fill_(float("nan"))
                parameter.data = moved
        assert relative(tensor_of(model(*args, **kwargs)), expected[number]) < TIGHT, f"step {number}"
    for seed in (1, 2):
        calls = found.generation(plan.steps, seed=seed)
        agree(run(model, calls), found, plan, calls)
    assert len(graphs_of(model).recorded) == plan.steps


@pytest.mark.parametrize("stop", [1, 4])
def test_guidance_ends_and_the_state_goes_on_in_the_graphs_of_half_the_batch(place: Place, stop: int) -> None:
    found = place.case(dit())
    plan = make_plan(found, ROWS, window=5)
    model = recording(found, plan)
    for generation in range(4):
        calls, pairs = found.generation(plan.steps, seed=generation), halves(found, plan.steps, seed=generation)
        oracle = Oracle(found.model, plan)
        difa_fx.reset(model)
        for step, (whole, (single, _)) in enumerate(zip(calls, pairs, strict=True)):
            args, kwargs = whole if step < stop else single
            theirs = tensor_of(oracle(step, *whole[0], **whole[1]))
            got = tensor_of(model(*args, **kwargs))
            assert relative(got, theirs if step < stop else theirs.chunk(2)[0]) < TIGHT, f"step {step}"
    counts = [len(s.graphs.recorded) for r in registry.runners(model) for s in r.sessions if s.graphs is not None]
    assert counts == [stop, plan.steps - stop]


def test_a_denoiser_in_several_graphs(place: Place) -> None:
    found, plan = broken(place.case(toy(blocks=3)))
    model = recording(found, plan)
    for generation in range(3):
        calls = found.generation(plan.steps, seed=generation)
        agree(run(model, calls), found, plan, calls)
    assert place.made > plan.steps


def test_two_denoisers_of_one_class_take_turns(place: Place) -> None:
    first, second = (place.case(dit(seed=seed)) for seed in (1, 2))
    plan = make_plan(first, ROWS, window=5)
    options = {"plan": plan, "compiler": "eager", "mode": "reduce-overhead", "window_kernel": "sdpa"}
    models = [torch.compile(found.model, backend="difa", options=options, dynamic=False) for found in (first, second)]
    oracles = [Oracle(found.model, plan) for found in (first, second)]
    for generation in range(4):
        calls = first.generation(plan.steps, seed=generation)
        for model, oracle in zip(models, oracles, strict=True):
            difa_fx.reset(model)
            oracle.reset()
        for step, (args, kwargs) in enumerate(calls):
            for model, oracle in zip(models, oracles, strict=True):
                theirs = tensor_of(oracle(step, *args, **kwargs))
                assert relative(tensor_of(model(*args, **kwargs)), theirs) < TIGHT, f"step {step}"


def test_inputs_that_repeat_themselves_in_memory_and_inference_mode(place: Place) -> None:
    """Pipelines expand one timestep over the batch; a place that was made in inference mode serves outside of it."""
    found = place.case(dit())
    plan = make_plan(found, ROWS, window=5)
    model = recording(found, plan)
    for generation in range(5):
        calls = [
            (args, kwargs | {"timestep": kwargs["timestep"][:1].expand(len(kwargs["timestep"]))})
            for args, kwargs in found.generation(plan.steps, seed=generation)
        ]
        with torch.inference_mode(generation < 3), torch.no_grad():
            got = run(model, calls)
        agree(got, found, plan, calls)


def test_a_call_is_begun_before_its_timestep_is_known_and_is_right_when_it_was_not_the_next(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = place.case(dit())
    plan = make_plan(found, ROWS, window=5)
    model = recording(found, plan)
    for _ in range(2):
        run(model, found.generation(plan.steps))
    graphs = graphs_of(model)
    launched: list[int] = []
    launch = graphs.launch

    def noted(call: int, args: Any) -> Any:
        launched.append(call)
        return launch(call, args)

    monkeypatch.setattr(type(graphs), "launch", lambda _, call, args: noted(call, args))
    calls = found.generation(plan.steps, seed=3)
    agree([tensor_of(model(*args, **kwargs)) for args, kwargs in calls[:4]], found, plan, calls[:4])
    assert launched == [1, 2, 3]  # after a whole generation none goes on
    calls = found.generation(plan.steps, seed=4)
    agree([tensor_of(model(*args, **kwargs)) for args, kwargs in calls], found, plan, calls)
    assert launched[3:] == [4, *range(1, 10)]
    model(*calls[0][0], **calls[0][1])
    with pytest.raises(ClockError):
        model(*calls[5][0], **calls[5][1])
    calls = found.generation(plan.steps, seed=5)
    agree([tensor_of(model(*args, **kwargs)) for args, kwargs in calls], found, plan, calls)


def test_outputs_are_the_callers(place: Place) -> None:
    found = place.case(toy())
    plan = make_plan(found, ["full", "cached", "cached"], window=5)
    model = recording(found, plan)
    calls = found.generation(plan.steps)
    for _ in range(3):
        difa_fx.reset(model)
        kept = [tensor_of(model(*args, **kwargs)) for args, kwargs in calls]
        agree(kept, found, plan, calls)
        for output in kept:
            output.fill_(float("nan"))


def refuse(self: Any, *args: Any) -> Any:
    raise GraphError("no")


def test_what_cannot_be_recorded_is_said(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    found = place.case(toy())
    plan = make_plan(found, ["full", "cached"], window=5)
    model = recording(found, plan)
    calls = found.generation(plan.steps)
    run(model, calls)

    (session,) = runner(model).sessions
    with monkeypatch.context() as patched:
        patched.setattr(type(session.graphs), "_record", refuse)
        with pytest.raises(GraphError):
            run(model, calls)
    with pytest.raises(ClockError, match="no state"):
        model(*calls[1][0], **calls[1][1])
    for seed in (1, 2):
        calls = found.generation(plan.steps, seed=seed)
        agree(run(model, calls), found, plan, calls)
