"""Real denoisers, untouched: what is found in each, and that every method keeps its contract there.

The properties have the numbers of :mod:`test_properties`; here each model is compiled twice and all of them are read
off these two runs.
"""

from __future__ import annotations

from typing import Any

import pytest
from compiled import compiled, make_plan, run, same_input
from models import Case, relative, tensor_of
from oracle import Oracle
from zoo import NO_SITES, ORACLE, ZOO, refused, text_of, zoo_case

import difa_fx
from difa_fx import registry
from difa_fx.plan import Method
from difa_fx.runtime import Runner

NAMES = tuple(ZOO)
WITH_SITES = tuple(name for name in NAMES if name not in NO_SITES)
TIGHT = 5e-5
"""float32 and a few layers: what reordering sums may change, relative to the largest output."""

SAME = ["full", "window", "cached", "full", "cached", "window"]
SAME_CFG = ["full", "window", "cached", "full+cfg", "window+cfg", "cached", "window", "cached", "full"]
MIXED = ["full", "window", "cached", "full", "cached", "window"]
MIXED_CFG = ["full", "window+cfg", "cached", "full+cfg", "window", "cached", "window+cfg", "full", "window+cfg"]


def rows_for(found: Case, rows: list[str], cfg_rows: list[str]) -> list[list[str]]:
    """``rows`` for every site; a site that cannot do a method is full at that step."""
    wanted = cfg_rows if found.cfg_order else rows
    return [["full" if method in refused(found.name, site) else method for site in found.sites] for method in wanted]


def main_runners(model: Any) -> list[Runner]:
    """The runners of the graphs that have sites: one, or two where the first call fills a cache of the model's own."""
    return [runner for runner in registry.runners(model) if runner.stats.sites]


def pieces(model: Any) -> int:
    return sum(stats.pieces for stats in difa_fx.stats(model))


@pytest.mark.parametrize("name", NAMES)
def test_every_site_is_found_and_can_do_what_makes_sense(name: str) -> None:
    found = zoo_case(name)
    ((args, kwargs),) = found.generation(1)
    graphs = difa_fx.inspect(found.model, *args, **kwargs)
    sites = {site.path: site for graph in graphs for site in graph.sites}
    assert tuple(sites) == found.sites
    rejected = dict(pair for graph in graphs for pair in graph.rejected)
    assert tuple(rejected) == found.rejected
    assert all(rejected.values())
    for path, site in sites.items():
        assert {method for method, _ in site.refused} == refused(name, path), path
        assert site.kind == ("joint" if path in text_of(name) else "self"), path


@pytest.mark.parametrize("name", WITH_SITES)
def test_1_5_6_a_window_over_all_tokens_and_full_attention_are_the_denoiser(name: str) -> None:
    found = zoo_case(name)
    rows = [rows_for(found, [method], [method])[0] for method in ("full", "window", "full")]
    model = compiled(found, make_plan(found, rows, window=found.tokens), "eager")
    calls = found.generation(3)
    for step, (output, (args, kwargs)) in enumerate(zip(run(model, calls), calls, strict=True)):
        assert relative(output, tensor_of(found.model(*args, **kwargs))) < TIGHT, f"step {step}"
    compiled_once = pieces(model)
    run(model, calls)
    assert pieces(model) == compiled_once


@pytest.mark.parametrize("name", WITH_SITES)
def test_2_3_4_8_the_same_input_again_is_full(name: str) -> None:
    found = zoo_case(name)
    rows = rows_for(found, SAME, SAME_CFG)
    model = compiled(found, make_plan(found, rows, window=3), "eager")
    calls = same_input(found.generation(len(rows), same_halves=True))
    args, kwargs = calls[0]
    expected = tensor_of(found.model(*args, **kwargs))
    difa_fx.reset(model)
    held = []
    for step, (args, kwargs) in enumerate(calls):
        assert relative(tensor_of(model(*args, **kwargs)), expected) < TIGHT, f"step {step}: {rows[step][0]}"
        clock = main_runners(model)[0].sessions[0].clock
        clock.expected = (clock.timestep,) * len(rows)
        held.append(sum(runner.stats.state_bytes for runner in main_runners(model)))
    assert tuple(held) == main_runners(model)[0].stats.predicted_state_bytes
    assert held[0] > 0
    assert held[-1] == 0


@pytest.mark.parametrize("name", ORACLE)
def test_7_every_transition_agrees_with_the_oracle(name: str) -> None:
    found = zoo_case(name)
    plan = make_plan(found, rows_for(found, MIXED, MIXED_CFG), window=5)
    calls = found.generation(plan.steps)
    got = run(compiled(found, plan, "eager"), calls)
    expected = Oracle(found.model, plan, text_of(name)).run(calls)
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert relative(ours, tensor_of(theirs)) < 5 * TIGHT, f"step {step}"


def test_a_window_changes_what_is_computed() -> None:
    """Without this the properties above could hold for windows that are never cut."""
    found = zoo_case("sd3")
    calls = found.generation(2)
    plan = make_plan(found, ["full", "window"], window=3)
    output = run(compiled(found, plan, "eager"), calls)[1]
    args, kwargs = calls[1]
    assert relative(output, tensor_of(found.model(*args, **kwargs))) > 1e-3
    assert Method.WINDOW.value in {m.value for row in plan.methods for m in row}
