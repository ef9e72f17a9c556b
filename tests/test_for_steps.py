"""Plans for another number of steps: always valid, and reading nothing much older than the plan they come from."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_fx.errors import PlanError
from difa_fx.plan import Method, Plan

M = Method
REAL = sorted((Path(__file__).parent / "plans").glob("*.json"))
SITES = ("a", "b")


@st.composite
def plans(draw: st.DrawFn, most_steps: int = 12) -> Plan:
    steps = draw(st.integers(1, most_steps))
    row = st.lists(st.sampled_from(list(M)), min_size=2, max_size=2)
    later = draw(st.lists(row, min_size=steps - 1, max_size=steps - 1))
    times = draw(st.none() | st.lists(st.floats(0, 999), min_size=steps, max_size=steps))
    return Plan(
        steps=steps,
        sites=SITES,
        methods=[["full"] * 2, *later],
        window=3,
        cfg="cond_first",
        denoiser="DiT",
        timesteps=times,
        provenance=draw(st.sampled_from([{}, {"calibration": {"threshold": 0.1}}, {"derived": "by hand", "by": "me"}])),
    )


def column(text: str) -> Plan:
    """A plan of one site, a letter a step."""
    letters = {"F": M.FULL, "W": M.WINDOW, ".": M.CACHED, "f": M.FULL_CFG, "w": M.WINDOW_CFG}
    return Plan(steps=len(text), sites=["a"], methods=[[letters[x]] for x in text], window=3, cfg="cond_first")


def text(plan: Plan) -> str:
    return "".join(
        {"full": "F", "window": "W", "cached": ".", "full+cfg": "f", "window+cfg": "w"}[m] for m in plan.column("a")
    )


def reads(methods: tuple[Method, ...]) -> list[tuple[int | None, int | None]]:
    """For each step: the steps whose output and whose residual it uses, itself where it makes them, None for no use."""
    output = residual = 0
    found: list[tuple[int | None, int | None]] = []
    for step, method in enumerate(methods):
        output = step if method.computes else output
        residual = step if method.refreshes else residual
        found.append((output, residual if method.windowed else None))
    return found


def places(old_steps: int, steps: int) -> list[Fraction]:
    """Where each new step stands among the old ones."""
    return [step * Fraction(old_steps - 1, max(steps - 1, 1)) for step in range(steps)]


def round_up(place: Fraction) -> int:
    return int(place + Fraction(1, 2))


# Always


@given(plan=plans(), n=st.integers(1, 40))
@settings(deadline=None)
def test_always_a_valid_plan(plan, n):
    other = plan.for_steps(n)  # Plan checks itself
    assert (other.steps, len(other.methods), other.sites) == (n, n, plan.sites)
    assert (other.window, other.cfg, other.denoiser) == (plan.window, plan.cfg, plan.denoiser)
    assert set(other.methods[0]) == {M.FULL}
    assert {m for row in other.methods for m in row} <= {m for row in plan.methods for m in row}
    assert Plan.from_dict(other.to_dict()) == other
    if n > 1 and n >= plan.steps:
        assert other.methods[-1] == plan.methods[-1]


@given(plan=plans())
@settings(deadline=None)
def test_the_same_number_of_steps_is_the_same_plan(plan):
    assert plan.for_steps(plan.steps) == plan


@given(plan=plans(), n=st.integers(1, 40))
@settings(deadline=None)
def test_nothing_is_read_that_is_older_by_more_than_a_step(plan, n):
    other, place = plan.for_steps(n), places(plan.steps, n)
    scale, at = Fraction(plan.steps - 1, max(n - 1, 1)), [round_up(x) for x in place]
    for site in SITES:
        old = reads(plan.column(site))
        for step, new in enumerate(reads(other.column(site))):
            for was, now in zip(old[at[step]], new, strict=True):
                if was is not None and now is not None:
                    assert at[now] >= was - scale
                    if n >= plan.steps and was != at[step]:
                        assert place[step] - place[now] < at[step] - was + scale


@given(plan=plans(), n=st.integers(1, 40))
@settings(deadline=None)
def test_more_steps_repeat_every_step_as_often(plan, n):
    n += plan.steps
    other, at = plan.for_steps(n), [round_up(x) for x in places(plan.steps, n)]
    for site in SITES:
        assert other.column(site) == tuple(plan.column(site)[old] for old in at)
    often = [at.count(old) for old in range(plan.steps)]
    assert min(often) >= 1
    assert max(often[1:-1], default=1) - min(often[1:-1], default=1) <= 1


# The shares of the methods


@given(steps=st.integers(1, 60), every=st.integers(1, 8), method=st.sampled_from([M.CACHED, M.WINDOW, M.FULL_CFG]))
@settings(deadline=None)
def test_a_uniform_plan_doubled_keeps_its_shares(steps, every, method):
    plan = Plan.uniform(SITES, steps=steps, every=every, method=method, cfg="cond_first")
    other = plan.for_steps(2 * steps)
    for each in M:
        share, new = plan.counts()[each] / (2 * steps), other.counts()[each] / (4 * steps)
        assert abs(share - new) <= 1 / other.steps


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
@pytest.mark.parametrize("n", [10, 15, 25, 30, 50, 100])
def test_the_real_plans(path, n):
    plan = Plan.load(path)
    old, new = ({m: k / (p.steps * len(p.sites)) for m, k in p.counts().items()} for p in (plan, plan.for_steps(n)))
    if n > plan.steps:
        assert new == pytest.approx(old, abs=0.04)
    else:  # fewer steps refresh more often, since what was read is left out at times
        assert 0 <= new[M.FULL] + new[M.FULL_CFG] - old[M.FULL] - old[M.FULL_CFG] <= 0.2


# By hand


@pytest.mark.parametrize(
    ("old", "n", "new"),
    [
        ("F.", 4, "FF.."),
        ("F.F.", 8, "FF..FF.."),
        ("FWW", 6, "FFWWWW"),  # the middle one stands for the second and third new step, and half up for the fourth
        ("F.f", 5, "F..ff"),
        ("F....", 3, "F.."),
        ("FWWWW", 3, "FWW"),
        ("F..F..F", 3, "FFF"),
        ("Fw.W.", 1, "F"),
        ("F", 3, "FFF"),
        # Every full step but the first is left out; the step that would read it does its work.
        ("F.F.F.F.F", 4, "F.FF"),
        ("F......fW..", 6, "F...f."),
    ],
)
def test_by_hand(old, n, new):
    assert text(column(old).for_steps(n)) == new


def test_halving_refreshes_as_often_as_it_can():
    # Positions 0, 2.1, 4.2 ... drift from the full steps to the cached ones: they must not all read step 4.
    halved = text(column("F." * 10).for_steps(10))
    assert halved.startswith("FFFFF")
    assert ".." not in halved


# Timesteps and provenance


def test_timesteps():
    plan = Plan.uniform(SITES, steps=4, every=2, timesteps=[9, 6, 3, 0])
    assert plan.for_steps(2).timesteps is None
    assert plan.for_steps(2, timesteps=[9, 0]).timesteps == (9, 0)
    assert plan.for_steps(4).timesteps == (9, 6, 3, 0)
    assert plan.for_steps(4, timesteps=[8, 6, 4, 2]) == plan.replace(timesteps=[8, 6, 4, 2])
    with pytest.raises(PlanError, match="2 numbers"):
        plan.for_steps(3, timesteps=[1, 2])


def test_a_calibration_stays_the_originals():
    calibration = {"predicted": {"speed_up": 2.0}}
    plan = Plan.uniform(SITES, steps=4, every=2, provenance={"by": "me", "calibration": calibration})
    twice, back = plan.for_steps(8), plan.for_steps(8).for_steps(4)
    first = {"from_steps": 4, "to_steps": 8, "calibration of the original": calibration}
    assert twice.to_dict()["provenance"] == {"by": "me", "derived": first}
    second = {"from_steps": 8, "to_steps": 4, "before": first}
    assert back.to_dict()["provenance"] == {"by": "me", "derived": second}
    assert Plan.uniform(SITES, steps=4, every=2).for_steps(2).provenance == {
        "derived": {"from_steps": 4, "to_steps": 2}
    }


@pytest.mark.parametrize("n", [0, -1, True, 2.0, "4", None])
def test_bad_counts(n):
    with pytest.raises(PlanError) as caught:
        Plan.uniform(SITES, steps=4, every=2).for_steps(n)
    for words in ("where: n\n", "got: ", "allowed: 1, 2, ...", "to do: "):
        assert words in str(caught.value)
