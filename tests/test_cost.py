"""FLOPs: against brute force, the paper's table, and torch's own counter."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difa_fx.cost import (
    SiteShape,
    attention_flops,
    kept,
    kept_per_step,
    projection_flops,
    residual_writes,
    site_flops,
    window_pairs,
)
from difa_fx.errors import PlanError, SiteError
from difa_fx.plan import Method, Plan

PLANS = Path(__file__).parent / "plans"
WIDTH, HEADS = 1152, 16  # DiT-XL/2


def dit_xl(tokens: int, batch: int = 2) -> SiteShape:
    return SiteShape(
        batch=batch,
        heads=HEADS,
        tokens=tokens,
        head_dim=WIDTH // HEADS,
        projection_flops=projection_flops(batch, tokens, WIDTH),
    )


@given(tokens=st.integers(1, 60), window=st.integers(0, 80))
def test_window_pairs_is_exact(tokens, window):
    pairs = sum(abs(q - k) <= window for q in range(tokens) for k in range(tokens))
    assert window_pairs(tokens, window) == pairs


# The paper's table of single methods, whole attention module, in per cent of full.
@pytest.mark.parametrize(
    ("tokens", "asc", "wars", "wars_asc"),
    [(1024, 50, 77, 38), (4096, 50, 51, 26), (16384, 50, 33, 16)],
)
def test_the_papers_table_of_single_methods(tokens, asc, wars, wars_asc):
    shape = dit_xl(tokens)

    def share(method: Method, window: int) -> float:
        return 100 * site_flops(shape, method, window) / site_flops(shape, Method.FULL, window)

    window = tokens // 8  # to either side
    assert share(Method.FULL_CFG, window) == asc
    assert share(Method.WINDOW, window) == pytest.approx(wars, abs=1)
    assert share(Method.WINDOW_CFG, window) == pytest.approx(wars_asc, abs=1)
    assert share(Method.CACHED, window) == 0
    # tokens/8 in all, half as much to either side, is not what the table was made with
    assert abs(share(Method.WINDOW, window // 2) - wars) > 3


@pytest.mark.parametrize(("name", "without", "with_projections"), [("t0.05", 0.719, 0.883), ("t0.15", 0.394, 0.621)])
def test_the_real_plans(name, without, with_projections):
    plan = Plan.load(PLANS / f"dit-xl-2-512_20steps_{name}.json")
    shapes = dict.fromkeys(plan.sites, dit_xl(1024))
    assert kept(plan, shapes, False) == pytest.approx(without, abs=0.001)
    assert kept(plan, shapes, True) == pytest.approx(with_projections, abs=0.001)
    steps = kept_per_step(plan, shapes, True)
    assert len(steps) == 20
    assert steps[0] == 1
    assert kept(plan, shapes, True) == pytest.approx(sum(steps) / 20)
    assert kept(plan, shapes, True, refresh=True) > kept(plan, shapes, True)


def test_torch_counts_the_same():
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    shape = SiteShape(batch=2, heads=4, tokens=64, head_dim=8, projection_flops=projection_flops(2, 64, 32))
    project = torch.nn.Linear(32, 32, bias=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x_BND = torch.zeros(2, 64, 32)
        q, k, v = (project(x_BND).unflatten(-1, (4, 8)).transpose(1, 2) for _ in range(3))
        y = torch.softmax(q @ k.mT, -1) @ v
        project(y.transpose(1, 2).flatten(2))
    assert counter.get_total_flops() == site_flops(shape, Method.FULL, 0)


def test_each_method():
    shape = SiteShape(batch=2, heads=3, tokens=10, head_dim=4, projection_flops=1000)
    unit = 4 * 4 * 3 * 2
    assert attention_flops(shape, Method.FULL, 2) == unit * 100
    assert attention_flops(shape, Method.FULL_CFG, 2) == unit * 50
    assert attention_flops(shape, Method.WINDOW, 2) == unit * 44
    assert attention_flops(shape, Method.WINDOW_CFG, 2) == unit * 22
    assert attention_flops(shape, Method.CACHED, 2) == 0
    assert attention_flops(shape, Method.FULL, 2, refresh=True) == unit * 144
    assert attention_flops(shape, Method.WINDOW, 2, refresh=True) == unit * 44
    assert site_flops(shape, Method.FULL_CFG, 2) == unit * 50 + 500
    assert site_flops(shape, Method.CACHED, 2) == 0


@given(window=st.integers(9, 100))
def test_a_window_over_all_tokens_costs_full_attention(window):
    shape = SiteShape(batch=1, heads=1, tokens=10, head_dim=4)
    assert attention_flops(shape, Method.WINDOW, window) == (attention_flops(shape, Method.FULL, window))


def test_shape_defaults():
    shape = SiteShape(batch=2, heads=3, tokens=10, head_dim=4)
    assert (shape.kv_tokens, shape.output_numel, shape.residual_numel) == (10, 240, 240)
    other = SiteShape(batch=2, heads=3, tokens=10, head_dim=4, kv_tokens=7, output_numel=5)
    assert (other.kv_tokens, other.output_numel) == (7, 5)
    assert attention_flops(other, Method.FULL, 0) == 4 * 4 * 3 * 2 * 70


@pytest.mark.parametrize("field", ["batch", "heads", "tokens", "head_dim", "itemsize"])
def test_shape_refuses_zero(field):
    sizes = {"batch": 1, "heads": 1, "tokens": 1, "head_dim": 1} | {field: 0}
    with pytest.raises(SiteError, match=f"SiteShape.{field}"):
        SiteShape(**sizes)


def test_a_window_needs_as_many_keys_as_queries():
    shape = SiteShape(batch=1, heads=1, tokens=10, head_dim=4, kv_tokens=7)
    with pytest.raises(SiteError, match="10 queries, 7 keys"):
        attention_flops(shape, Method.WINDOW, 2)


def test_sites_outside_the_plan_count_as_full():
    plan = Plan.uniform(["a"], steps=2, every=2)
    shapes = dict.fromkeys(["a", "b"], dit_xl(64))
    assert kept_per_step(plan, shapes, False) == (1.0, 0.5)
    assert kept(plan, shapes, False) == 0.75
    with pytest.raises(PlanError, match="nearest: b"):
        kept(plan.replace(sites=["bb"]), shapes, False)


def test_residual_writes():
    plan = Plan(
        steps=5,
        sites=["a", "b"],
        methods=[
            ["full", "full"],
            ["cached", "full"],
            ["window", "full+cfg"],
            ["full", "window+cfg"],
            ["cached", "window"],
        ],
        window=4,
        cfg="cond_first",
    )
    assert residual_writes(plan) == {(0, "a"), (2, "b")}
