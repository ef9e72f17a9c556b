"""The solver for a budget, against every plan there is."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_fx.budget import SiteCosts, choose, least_seconds, plan_seconds
from difa_fx.errors import CalibrationError
from difa_fx.plan import Method, Plan
from difa_fx.plan_words import window_follows

M = Method
EVERY = {M.FULL: 4.0, M.WINDOW: 2.0, M.CACHED: 0.0, M.FULL_CFG: 2.5, M.WINDOW_CFG: 1.5}

# Round numbers make ties, which a solver must survive.
amounts = st.integers(0, 24).map(lambda n: n / 8) | st.floats(0, 3)
fractions = st.floats(0, 1)


@st.composite
def site_costs(draw: st.DrawFn, steps: int) -> SiteCosts:
    possible = draw(st.sets(st.sampled_from([m for m in M if m is not M.FULL])))

    def errors(*shape: int) -> np.ndarray:
        size = math.prod(shape)
        return np.array(draw(st.lists(amounts, min_size=size, max_size=size))).reshape(shape)

    return SiteCosts(
        seconds={m: draw(amounts) for m in M if m is M.FULL or m in possible},
        refresh_seconds=draw(amounts),
        refresh_cfg_seconds=draw(amounts),
        cached=errors(steps, steps),
        window=errors(steps, steps),
        cfg=errors(steps),
    )


@st.composite
def problems(draw: st.DrawFn, most_sites: int, most_steps: int) -> list[SiteCosts]:
    steps = draw(st.integers(1, most_steps))
    return [draw(site_costs(steps)) for _ in range(draw(st.integers(1, most_sites)))]


def example(steps: int = 3, **changes: object) -> SiteCosts:
    errors = np.ones((steps, steps))
    fields: dict[str, object] = {
        "seconds": EVERY,
        "refresh_seconds": 1.0,
        "refresh_cfg_seconds": 0.5,
        "cached": 4 * errors,
        "window": 2 * errors,
        "cfg": np.ones(steps),
    }
    return SiteCosts(**(fields | changes))


def walk(seed: int, sites: int, steps: int) -> list[SiteCosts]:
    """Sites whose outputs drift as a denoiser's do: errors grow with the distance in time."""
    rng = np.random.default_rng(seed)
    costs = []
    for _ in range(sites):
        at = rng.uniform(0.2, 2) * np.abs(rng.normal(size=steps)).cumsum()
        apart = np.abs(at[:, None] - at)
        cfg = rng.uniform(0.05, 1, steps)
        costs.append(example(steps, cached=apart, window=apart * rng.uniform(0.2, 0.6, apart.shape), cfg=cfg))
    return costs


def price(site: SiteCosts, column: tuple[Method, ...]) -> tuple[float, float]:
    """Seconds and error of one site's methods, straight from their definition."""
    seconds, errors, output, residual = 0.0, [], 0, 0
    for t, method in enumerate(column):
        seconds += site.seconds[method]
        if method.refreshes:
            errors.append(site.cfg[t] if method.shares_cfg else 0.0)
            if window_follows(column, t):
                seconds += site.refresh_cfg_seconds if method.shares_cfg else site.refresh_seconds
            residual = t
        elif method.windowed:
            own = site.cfg[t] if method.shares_cfg and column[residual] is M.FULL else 0.0
            errors.append(site.window[t, residual] + errors[residual] + own)
        else:
            errors.append(site.cached[t, output] + errors[output])
        output = t if method.computes else output
    return seconds, sum(errors)


def every_price(site: SiteCosts) -> np.ndarray:
    """[plans, 2]: seconds and error of every column of methods that the site can do."""
    later = itertools.product(site.seconds, repeat=site.steps - 1)
    return np.array([price(site, (M.FULL, *rest)) for rest in later])


def every_total(sites: list[SiteCosts]) -> np.ndarray:
    totals = np.zeros((1, 2))
    for site in sites:
        totals = (totals[:, None] + every_price(site)).reshape(-1, 2)
    return totals


# Against every plan


@given(sites=problems(most_sites=2, most_steps=4), share=fractions)
@settings(max_examples=60, deadline=None)
def test_between_the_bound_and_the_best(sites, share):
    totals = every_total(sites)
    least, most = totals[:, 0].min(), len(sites[0].cfg) * sum(site.seconds[M.FULL] for site in sites)
    assert least_seconds(sites) == pytest.approx(least)
    budget = least_seconds(sites) + share * (most - least)
    choice = choose(sites, budget_seconds=budget)
    columns = list(zip(*choice.methods, strict=True))
    seconds, error = np.sum([price(*pair) for pair in zip(sites, columns, strict=True)], axis=0)
    assert (choice.seconds, choice.error) == pytest.approx((seconds, error))
    assert plan_seconds(sites, choice.methods) == pytest.approx(seconds)
    assert choice.seconds <= budget * (1 + 1e-9)
    best = totals[totals[:, 0] <= budget * (1 + 1e-9), 1].min()
    assert choice.error >= best - 1e-9
    assert 0 <= choice.bound <= best + 1e-9
    assert choice.gap == choice.error - choice.bound >= 0
    names = [f"site{i}" for i in range(len(sites))]
    Plan(steps=len(choice.methods), sites=names, methods=choice.methods, window=1, cfg="cond_first")


@given(sites=problems(most_sites=1, most_steps=5), per_second=st.floats(0.01, 10))
@settings(max_examples=40, deadline=None)
def test_one_site_is_exact_where_the_dual_is(sites, per_second):
    seconds, errors = every_price(sites[0]).T
    at = (errors + per_second * seconds).argmin()
    choice = choose(sites, budget_seconds=seconds[at])
    assert choice.error == pytest.approx(errors[at], abs=1e-9)
    assert choice.gap == pytest.approx(0, abs=1e-9)


# What is chosen


def test_a_budget_for_full_is_full():
    choice = choose([example(), example()], budget_seconds=24.0)
    assert choice.methods == ((M.FULL, M.FULL),) * 3
    assert (choice.seconds, choice.error, choice.bound, choice.gap) == (24, 0, 0, 0)


def test_one_step_is_full():
    assert least_seconds([example(1)]) == 4
    assert choose([example(1)], budget_seconds=4).methods == ((M.FULL,),)


def test_the_least_budget_still_takes_the_least_error():
    # Two methods are free; the one that shares the halves brings less error.
    site = example(2, seconds={M.FULL: 4.0, M.CACHED: 0.0, M.FULL_CFG: 0.0})
    choice = choose([site], budget_seconds=least_seconds([site]))
    assert choice.methods[1] == (M.FULL_CFG,)
    assert (choice.seconds, choice.error) == (4, 1)


def test_a_residual_is_paid_for_once():
    # full 4 + its residual 1 + two windows of 2, and the fourth step is cached: 9.
    site = example(4, seconds={M.FULL: 4.0, M.WINDOW: 2.0, M.CACHED: 0.0})
    rows = ((M.FULL,), (M.WINDOW,), (M.WINDOW,), (M.CACHED,))
    assert plan_seconds([site], rows) == 9
    assert plan_seconds([site], ((M.FULL,), (M.CACHED,), (M.FULL,), (M.WINDOW,))) == 11


def test_the_site_that_suffers_least_is_cut_first():
    weak, strong = example(cached=np.full((3, 3), 0.1)), example(cached=np.full((3, 3), 9.0))
    choice = choose([strong, weak], budget_seconds=16)
    assert choice.methods == ((M.FULL, M.FULL), (M.FULL, M.CACHED), (M.FULL, M.CACHED))


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 0.9])
def test_many_sites_leave_little_gap(share):
    sites = walk(0, 28, 20)
    least, most = least_seconds(sites), 28 * 20 * EVERY[M.FULL]
    choice = choose(sites, budget_seconds=least + share * (most - least))
    assert choice.gap <= 0.02 * choice.error
    assert choice.seconds >= 0.99 * (least + share * (most - least))


@given(sites=problems(most_sites=2, most_steps=5), shares=st.tuples(fractions, fractions))
@settings(max_examples=40, deadline=None)
def test_a_larger_budget_is_worse_by_the_gap_at_most(sites, shares):
    # The best plan never gets worse.  Where the bound is not reached, another search may end at another plan.
    least, most = least_seconds(sites), sites[0].steps * sum(site.seconds[M.FULL] for site in sites)
    small, large = (choose(sites, budget_seconds=least + s * max(most - least, 0)) for s in sorted(shares))
    assert large.bound <= small.error + 1e-9
    assert large.error <= small.error + large.gap + 1e-9
    assert choose(sites, budget_seconds=max(most, least)).error == 0


def test_what_is_left_is_spent():
    # At no price of a second is a window best, so that the search by price alone leaves 3 s unspent.
    for refresh, method in ((1.0, M.WINDOW), (1.1, M.CACHED)):
        site = example(2, seconds={M.FULL: 4.0, M.WINDOW: 2.0, M.CACHED: 0.0}, refresh_seconds=refresh)
        assert choose([site], budget_seconds=7).methods[1] == (method,)


# What is refused


@pytest.mark.parametrize("budget", [5.99, 0, -1.0])
def test_a_budget_below_the_least(budget):
    sites = [example(2, seconds={M.FULL: 3.0, M.CACHED: 0.0})] * 2
    with pytest.raises(CalibrationError) as caught:
        choose(sites, budget_seconds=budget)
    for words in ("where: budget_seconds", f"got: {budget:.6g} s", "allowed: 6 s or more", "full take 12 s", "to do: "):
        assert words in str(caught.value)


@pytest.mark.parametrize("budget", [math.nan, math.inf, "7", None, True])
def test_a_budget_that_is_no_number(budget):
    with pytest.raises(CalibrationError, match="budget_seconds"):
        choose([example()], budget_seconds=budget)


def spoiled(place: tuple[int, ...], value: float) -> np.ndarray:
    errors = np.ones((3,) * len(place))
    errors[place] = value
    return errors


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"seconds": {M.CACHED: 0.0}}, "seconds"),
        ({"seconds": {M.FULL: 1.0, "half": 1.0}}, "seconds"),
        ({"seconds": {M.FULL: math.nan}}, "seconds[full]"),
        ({"seconds": {M.FULL: 1.0, M.WINDOW: -1.0}}, "seconds[window]"),
        ({"seconds": {M.FULL: True}}, "seconds[full]"),
        ({"refresh_seconds": math.inf}, "refresh_seconds"),
        ({"refresh_cfg_seconds": "1"}, "refresh_cfg_seconds"),
        ({"cached": spoiled((2, 1), math.nan)}, "cached[2, 1]"),
        ({"cached": spoiled((2, 1), -1e-9)}, "cached[2, 1]"),
        ({"window": spoiled((1, 0), math.inf)}, "window[1, 0]"),
        ({"cfg": spoiled((2,), math.inf)}, "cfg[2]"),
        ({"cached": np.ones((3, 4))}, "cached"),
        ({"cached": np.ones(3)}, "cached"),
        ({"cached": 1.0}, "cached"),
        ({"cached": np.ones((0, 0)), "window": np.ones((0, 0)), "cfg": np.ones(0)}, "cached"),
        ({"window": np.ones((2, 2))}, "window"),
        ({"cfg": np.ones(4)}, "cfg"),
        ({"cfg": np.array(["a"] * 3)}, "cfg"),
        ({"cfg": np.ones(3, dtype=complex)}, "cfg"),
        ({"window": None}, "window"),
    ],
)
def test_wrong_costs(changes, where):
    with pytest.raises(CalibrationError) as caught:
        example(**changes)
    assert f"where: {where}\n" in str(caught.value)
    assert "to do: " in str(caught.value)


def test_what_no_plan_reads_is_not_looked_at():
    apart = np.where(np.tri(3, k=-1, dtype=bool), 1.0, math.nan)
    some = {M.FULL: 4.0, M.CACHED: 0.0}
    site = example(seconds=some, cached=apart, window=np.full((3, 3), math.nan), cfg=np.full(3, math.inf))
    assert choose([site], budget_seconds=8).error == 1
    assert example(cfg=np.array([math.nan, 1, 1])).cfg[0] == 0


def test_costs_are_their_own():
    errors = np.ones((3, 3))
    site = example(cached=errors)
    errors[:] = 7
    assert site.cached.max() == 1
    with pytest.raises(ValueError, match="read-only"):
        site.cached[1, 0] = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        site.cfg = errors


@pytest.mark.parametrize("sites", [[], [example(3), example(4)]])
def test_sites_must_agree(sites):
    for ask in (least_seconds, lambda s: choose(s, budget_seconds=9), lambda s: plan_seconds(s, [])):
        with pytest.raises(CalibrationError, match="where: sites"):
            ask(sites)


@pytest.mark.parametrize(
    ("rows", "where"),
    [
        ([[M.FULL]], "methods"),
        ([[M.FULL, M.FULL], [M.FULL]], "methods"),
        ([[M.CACHED], [M.FULL]], "methods[0][0]"),
        ([[M.FULL], [M.WINDOW]], "methods[1][0]"),
    ],
)
def test_methods_that_cannot_be_priced(rows, where):
    with pytest.raises(CalibrationError) as caught:
        plan_seconds([example(2, seconds={M.FULL: 1.0, M.CACHED: 0.0})], rows)
    assert f"where: {where}\n" in str(caught.value)


def test_no_torch(tmp_path):
    code = "import difa_fx.budget, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "False\n"
