"""The paper's count of operations, against what torch counts in the rewritten pieces, and the conversion of losses.

``test_cost.py`` compares the formulas with the paper's table and with the two published plans.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_commands import command
from compiled import compiled, make_plan, run
from models import Case, dit, pixart
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import difa_fx
from difa_fx import banded
from difa_fx.cost import SiteShape, attention_flops, kept, kept_per_step, residual_writes, site_flops
from difa_fx.plan import Method, Plan
from difa_fx.runtime import Runner

aten = torch.ops.aten
ROOT = Path(__file__).resolve().parent.parent


def raw(function: Any) -> Any:
    """A formula that torch's counter gives the tensors, not their shapes."""
    function._get_raw = True
    return function


CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **more: sdpa_flop_count(q, k, v)
}
"""torch's counter has its formula for the operators of CUDA alone."""


def tiles(implementation: Any) -> Any:
    """Counts what a windowed operator does inside, which torch's counter does not see."""

    @raw
    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            implementation(*args, **kwargs)
        return int(counter.get_total_flops())

    return count


INSIDE = {
    torch.ops.difa.band_attention: tiles(banded._band_attention),
    torch.ops.difa.band_residual: tiles(banded._band_residual),
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[dict[Any, int]]:
    """Operations of each call of a compiled denoiser, by operator.

    A tile is one query, so that nothing is computed beside the window.
    """
    calls: list[dict[Any, int]] = []
    original = Runner.__call__

    def call(self: Runner, *args: Any) -> tuple[Any, ...]:
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION | INSIDE) as counter:
            result = original(self, *args)
        calls.append(dict(counter.get_flop_counts()["Global"]))
        return result

    monkeypatch.setattr(Runner, "__call__", call)
    monkeypatch.setattr(banded, "tile_shape", lambda grid, size: (1,) * len(grid))
    return calls


def of_attention(count: dict[Any, int]) -> int:
    return sum(count.get(name, 0) for name in (aten.bmm, *CPU_ATTENTION, *INSIDE))


def shapes_of(model: Any) -> dict[str, SiteShape]:
    (stats,) = difa_fx.stats(model)
    return dict(stats.shapes)


def generation(found: Case, plan: Plan) -> Any:
    """Run a generation under the plan, in float64: its windows are tiles, not a kernel that torch cannot look into."""
    found.model.double()
    calls = [
        tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, call)
        for call in found.generation(plan.steps)
    ]
    model = compiled(found, plan)
    run(model, calls)
    return model


ROWS = ["full", "window", "full+cfg", "window+cfg", "cached", "full", "cached"]


@pytest.mark.parametrize("build", [dit, pixart])
def test_torch_counts_the_same_in_the_pieces_of_every_method(build: Any, counted: list[dict[Any, int]]) -> None:
    found: Case = build(sample_size=8, width=48, heads=3)
    plan = make_plan(found, ROWS, window=7)
    shapes = shapes_of(generation(found, plan))
    refreshed = {step for step, _ in residual_writes(plan)}
    assert refreshed == {0, 2}
    # Sites that are all cached compute nothing, so what such a step does is everything else.
    rest = counted[-1]
    for step, name in enumerate(ROWS):
        method, refresh = Method(name), step in refreshed
        alone = sum(attention_flops(shape, method, 7, refresh=refresh) for shape in shapes.values())
        everything = sum(site_flops(shape, method, 7, refresh=refresh) for shape in shapes.values())
        assert of_attention(counted[step]) - of_attention(rest) == alone
        assert sum(counted[step].values()) - sum(rest.values()) == everything
        assert (everything > alone > 0) == method.computes


def test_torch_counts_what_a_mixed_plan_keeps(counted: list[dict[Any, int]]) -> None:
    found = dit(layers=3)
    rows = [
        ["full", "full", "full"],
        ["window", "cached", "full+cfg"],
        ["window+cfg", "full", "cached"],
        ["cached", "cached", "cached"],
    ]
    plan = make_plan(found, rows, window=5)
    shapes = shapes_of(generation(found, plan))
    for projections in (False, True):
        own = of_attention if not projections else lambda count: sum(count.values())
        # A step whose sites are all cached does everything else.
        done = [own(count) - own(counted[3]) for count in counted]
        full = sum((site_flops if projections else attention_flops)(s, Method.FULL, 5) for s in shapes.values())
        expected = kept_per_step(plan, shapes, projections, refresh=True)
        assert [count / full for count in done] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tokens", "asc", "wars", "wars_asc"), [(1024, 50, 77, 38), (4096, 50, 51, 26), (16384, 50, 33, 16)]
)
def test_a_layer_of_dit_xl_as_it_is_found_gives_the_papers_table(
    tokens: int, asc: float, wars: float, wars_asc: float
) -> None:
    found = dit(layers=1, width=1152, heads=16, sample_size=32)
    model = compiled(found, Plan.full(found.sites, steps=1, window=128, cfg="cond_first"))
    run(model, found.generation(1, batch=2))
    (shape,) = shapes_of(model).values()
    assert (shape.tokens, shape.heads * shape.head_dim) == (1024, 1152)
    times = tokens // 1024  # projections grow with the tokens, and the numbers of pairs are the formula's
    shape = dataclasses.replace(shape, tokens=tokens, kv_tokens=tokens, projection_flops=times * shape.projection_flops)

    def share(method: Method) -> float:
        return 100 * site_flops(shape, method, tokens // 8) / site_flops(shape, Method.FULL, tokens // 8)

    assert share(Method.FULL_CFG) == pytest.approx(asc, abs=1)
    assert share(Method.WINDOW) == pytest.approx(wars, abs=1)
    assert share(Method.WINDOW_CFG) == pytest.approx(wars_asc, abs=1)
    assert share(Method.CACHED) == 0


@pytest.mark.parametrize(("name", "alone", "with_projections"), [("t0.05", 72, 88), ("t0.15", 39, 62)])
def test_the_published_plans_keep_what_the_page_says(name: str, alone: int, with_projections: int) -> None:
    plan = Plan.load(ROOT / "tests" / "plans" / f"dit-xl-2-512_20steps_{name}.json")
    shape = SiteShape(batch=2, heads=16, tokens=1024, head_dim=72, projection_flops=8 * 2 * 1024 * 1152**2)
    shapes = dict.fromkeys(plan.sites, shape)
    assert round(100 * kept(plan, shapes, projections=False)) == alone
    assert round(100 * kept(plan, shapes, projections=True)) == with_projections
    page = (ROOT / "docs" / "reproduce.md").read_text()
    assert f"| {alone} % | {with_projections} % |" in page


def test_the_conversion_of_thresholds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--thresholds", "0.1", "--samples", "2", "--steps", "2", "--compiler", "eager", "--near", "10"]
    trials = command("losses").main([*tiny, "-o", str(tmp_path / "losses")])
    # A layer is tried with one to four methods; the first step has no trials.
    assert 6 <= len(trials) <= 24
    assert all(trial.reference >= trial.paper > 0 for trial in trials)
    assert {round(trial.limit, 6) for trial in trials} <= {round(0.1 * i / 6, 6) for i in range(1, 7)}
    record = json.loads((tmp_path / "losses.json").read_text())
    assert len(record["trials"]) == len(trials)
    table = (tmp_path / "losses.md").read_text()
    assert table in capsys.readouterr().out
    assert f"| 0.1 | all | {len(trials)} |" in table
    factor = statistics.median(t.reference / t.paper for t in trials if t.limit / 10 <= t.paper <= t.limit * 10)
    assert f"The paper's 0.1 is about {0.1 * factor:.3g} for the authors' code." in table


def test_the_page_says_what_was_measured_of_thresholds() -> None:
    measured = (ROOT / "benchmarks" / "results" / "losses.md").read_text()
    page = (ROOT / "docs" / "reproduce.md").read_text()
    found = re.findall(r"The paper's (\S+) is about (\S+) for", measured)
    assert len(found) == 6
    for own, theirs in found:
        assert f"| {own} | {theirs} |" in page
