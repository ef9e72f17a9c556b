"""What holds for any denoiser without a reference, and agreement with the eager oracle on random plans.

The numbers are the design's: 1 window over all tokens, 2 the residual is exact, 3 cached is exact, 4 equal
halves, 5 all full and no plan, 6 compilations, 7 the oracle, 8 state bytes.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import pytest
import torch
from compiled import compiled, make_plan, run, runner, same_input
from drawn_plans import plans
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import CASES, CFG_CASES, Case, case, dit, relative, tensor_of, toy
from oracle import Oracle
from thorough import cases

import difa_fx
from difa_fx.plan import Plan
from difa_fx.schedule import make_schedule

CORE = {"dit", "digits", "pixart", "toy_one_block", "toy_three_blocks", "toy_odd_batch", "toy_mask_bool"}
"""A half of the batch can be shared in all but one of these; every other case runs when thorough."""

NAMES = cases(CASES, core=CORE)
CFG_NAMES = cases(CFG_CASES, core=CORE.intersection(CFG_CASES))
TIGHT = 2e-5
"""float32 and a few layers: what reordering sums may change, relative to the largest output."""


def plain(found: Case, call: object) -> torch.Tensor:
    args, kwargs = call  # type: ignore[misc]
    return tensor_of(found.model(*args, **kwargs))


@pytest.mark.parametrize("name", NAMES)
def test_1_window_over_all_tokens_is_full(name: str) -> None:
    found = case(name)
    model = compiled(found, make_plan(found, ["full", "window"], window=found.tokens))
    calls = found.generation(2)
    assert relative(run(model, calls)[1], plain(found, calls[1])) < TIGHT


@pytest.mark.parametrize("method", ["window", "cached"])
@pytest.mark.parametrize("name", NAMES)
def test_2_3_the_same_input_again_is_full(name: str, method: str) -> None:
    found = case(name)
    model = compiled(found, make_plan(found, ["full", method], timesteps=[999, 999]))
    calls = same_input(found.generation(2))
    outputs = run(model, calls)
    (session,) = runner(model).sessions
    assert session.clock.position == 1
    assert relative(outputs[0], plain(found, calls[0])) < TIGHT
    assert relative(outputs[1], plain(found, calls[0])) < TIGHT


@pytest.mark.parametrize("name", CFG_NAMES)
def test_4_equal_halves_share_exactly(name: str) -> None:
    found = case(name)
    model = compiled(found, make_plan(found, ["full", "full+cfg", "window+cfg"]))
    calls = found.generation(3, same_halves=True)
    outputs = run(model, calls)
    assert relative(outputs[1], plain(found, calls[1])) < TIGHT
    again = compiled(found, make_plan(found, ["full", "full+cfg", "window"]))
    assert relative(outputs[2], run(again, calls)[2]) < TIGHT


@pytest.mark.parametrize("name", NAMES)
def test_5_all_full_is_the_denoiser(name: str) -> None:
    found = case(name)
    calls = found.generation(2)
    model = compiled(found, make_plan(found, ["full", "full"]), "aot_eager")
    for output, call in zip(run(model, calls), calls, strict=True):
        assert relative(output, plain(found, call)) < TIGHT


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(["dit", "toy_three_blocks"], core={"dit"}))
def test_5_no_plan_is_inductor_bit_for_bit(name: str) -> None:
    found = case(name)
    ((args, kwargs),) = found.generation(1)
    ours = tensor_of(compiled(found, None, "inductor")(*args, **kwargs)).clone()
    torch._dynamo.reset()
    theirs = tensor_of(torch.compile(found.model, backend="inductor", dynamic=False)(*args, **kwargs))
    assert torch.equal(ours, theirs)


def count_pieces(plan: Plan, sites: Sequence[str]) -> int:
    """A region's actions; and the first, the middle and the last trunk, each by what lies before it and behind."""
    rows = make_schedule(plan, sites).rows
    actions = {entry.action for row in rows for entry in row if entry.runs}
    trunks = set()
    for row in rows:
        for number, (before, behind) in enumerate(zip((None, *row), (*row, None), strict=True)):
            kind = "first" if not number else "last" if number == len(sites) else "middle"
            trunks.add((kind, before is not None and before.output_half, behind is not None and not behind.runs))
    return len(trunks) + len(actions)


def test_6_pieces_are_unique_segments_times_variants() -> None:
    found = dit(layers=5)
    rows = [
        "full",
        ["window", "cached", "full+cfg", "window", "full"],
        ["window+cfg", "cached", "cached", "full", "cached"],
        "window",
    ]
    plan = make_plan(found, rows)
    model = compiled(found, plan)
    calls = found.generation(4)
    run(model, calls)
    compiled_first = runner(model).stats.pieces
    # Regions, all of one signature: full and full->r (sites 0 and 2 of step 0 differ in what is read later), window,
    # full+cfg->r, window+cfg.
    assert len({s.signature for s in runner(model).partition.segments if s.site is not None}) == 1
    assert compiled_first == count_pieces(plan, found.sites)
    run(model, calls)
    assert runner(model).stats.pieces == compiled_first
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_6_a_deep_denoiser_has_few_unique_blocks() -> None:
    plan = Plan.load("tests/plans/dit-xl-2-512_20steps_t0.15.json").replace(window=2)
    found = dit(layers=28, width=16, heads=2, sample_size=4)
    model = compiled(found, plan)
    calls = found.generation(20)
    first = run(model, calls)
    for _ in range(2):
        assert torch.equal(run(model, calls)[-1], first[-1])
    stats = runner(model).stats
    assert stats.unique_blocks <= 3
    assert stats.pieces == count_pieces(plan, found.sites) == 13
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("order", ["cond_first", "uncond_first"])
@pytest.mark.parametrize("kind", ["dit", "toy"])
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_7_random_plans_agree_with_the_oracle(kind: str, order: str, data: st.DataObject) -> None:
    found = dit(cfg_order=order) if kind == "dit" else toy(cfg_order=order)
    plan = data.draw(plans(found))
    calls = found.generation(plan.steps, seed=data.draw(st.integers(0, 9)))
    torch._dynamo.reset()
    got = run(compiled(found, plan, "eager"), calls)
    for step, (ours, theirs) in enumerate(zip(got, Oracle(found.model, plan).run(calls), strict=True)):
        assert relative(ours, tensor_of(theirs)) < 5 * TIGHT, f"step {step} of {plan.methods}"


ROWS = ["full", "window", "cached", "full", "cached", "window"]
CFG_ROWS = ["full", "window+cfg", "cached", "full+cfg", "window", "cached", "window+cfg", "full", "window+cfg"]


@pytest.mark.parametrize("name", CASES)
def test_7_every_transition_agrees_with_the_oracle(name: str) -> None:
    found = case(name)
    plan = make_plan(found, CFG_ROWS if name in CFG_CASES else ROWS, window=5)
    calls = found.generation(plan.steps)
    got = run(compiled(found, plan, "eager"), calls)
    for step, (ours, theirs) in enumerate(zip(got, Oracle(found.model, plan).run(calls), strict=True)):
        assert relative(ours, tensor_of(theirs)) < 5 * TIGHT, f"step {step}"


@pytest.mark.slow
@pytest.mark.parametrize("kernel", cases(["cpp", "sdpa", "flex"], core={"cpp"}))
def test_7_inductor_agrees_with_the_oracle(kernel: str) -> None:
    found = dit(layers=2, sample_size=16)
    plan = make_plan(found, CFG_ROWS, window=9)
    calls = found.generation(plan.steps)
    got = run(compiled(found, plan, "inductor", window_kernel=kernel), calls)
    for step, (ours, theirs) in enumerate(zip(got, Oracle(found.model, plan).run(calls), strict=True)):
        assert relative(ours, tensor_of(theirs)) < 5 * TIGHT, f"step {step}"


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_8_state_is_what_the_schedule_predicts(name: str) -> None:
    found = case(name)
    model = compiled(found, make_plan(found, CFG_ROWS), "eager")
    difa_fx.reset(model)
    held = []
    for args, kwargs in found.generation(len(CFG_ROWS)):
        model(*args, **kwargs)
        held.append(runner(model).stats.state_bytes)
    assert tuple(held) == runner(model).stats.predicted_state_bytes
    assert held[0] > 0
    assert held[-1] == 0


def test_8_memory_does_not_grow() -> None:
    found = case("dit")
    model = compiled(found, make_plan(found, CFG_ROWS), "eager")
    calls = found.generation(len(CFG_ROWS))

    def live_bytes() -> int:
        gc.collect()
        tensors = (o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))
        return sum(t.numel() * t.element_size() for t in tensors)

    for _ in range(2):
        run(model, calls)
    before = live_bytes()
    for _ in range(48):
        run(model, calls)
    assert live_bytes() == before


@pytest.mark.parametrize("mode", ["inference_mode", "autocast", "bfloat16"])
def test_other_ways_to_run_agree_with_the_oracle(mode: str) -> None:
    found = dit(layers=2)
    plan = make_plan(found, CFG_ROWS)
    calls = found.generation(plan.steps)
    expected = [tensor_of(output) for output in Oracle(found.model, plan).run(calls)]
    if mode == "bfloat16":
        found.model.to(torch.bfloat16)
        calls = [((args[0].bfloat16(),), kwargs) for args, kwargs in calls]
    contexts = {
        "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "bfloat16": torch.no_grad(),
    }
    with contexts[mode]:
        got = run(compiled(found, plan), calls)
    rounding = TIGHT if mode == "inference_mode" else 0.05
    assert all(relative(a.float(), b) < rounding for a, b in zip(got, expected, strict=True))
    assert got[0].dtype is (torch.float32 if mode == "inference_mode" else torch.bfloat16)
