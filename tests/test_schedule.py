"""Liveness: what the schedule keeps is what a simulation that looks at every later read would keep."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from difa_fx.cost import SiteShape
from difa_fx.plan import Method, Plan
from difa_fx.schedule import make_schedule

SHAPE = SiteShape(batch=2, heads=1, tokens=4, head_dim=2, itemsize=4)
WHOLE = 2 * 4 * 2 * 4


def column(*methods: str) -> Plan:
    return Plan(steps=len(methods), sites=("a",), methods=[[m] for m in methods], window=1, cfg="cond_first")


def test_a_state_is_held_from_its_writer_to_its_last_reader() -> None:
    plan = column("full", "window", "cached", "cached", "full", "full+cfg", "cached", "window+cfg", "full")
    held = make_schedule(plan, ["a"]).state_bytes({"a": SHAPE})
    # residual; output of the window step; the same; none; none; half residual and half output; half residual; none
    assert held == (WHOLE, WHOLE, WHOLE, 0, 0, WHOLE, WHOLE // 2, 0, 0)


def test_a_site_that_the_plan_does_not_name_is_full() -> None:
    schedule = make_schedule(column("full", "cached"), ["a", "b"])
    assert [schedule.row(step)["b"].action.method for step in range(2)] == [Method.FULL, Method.FULL]


def test_nothing_is_written_that_nobody_reads() -> None:
    schedule = make_schedule(column("full", "full", "window", "full"), ["a"])
    assert [row[0].action.writes_residual for row in schedule.rows] == [False, True, False, False]
    assert not any(row[0].keeps_output for row in schedule.rows)


@given(st.lists(st.sampled_from(list(Method)), max_size=9))
def test_liveness_agrees_with_a_simulation(rest: list[Method]) -> None:
    methods = [Method.FULL, *rest]
    schedule = make_schedule(column(*(m.value for m in methods)), ["a"])
    for step in range(len(methods)):
        later = methods[step + 1 :]
        keeps_output = later[:1] == [Method.CACHED]
        until_full = []
        for method in later:
            if method.refreshes:
                break
            until_full.append(method)
        entry = schedule.rows[step][0]
        assert entry.keeps_output is keeps_output
        assert entry.keeps_residual is any(m.windowed for m in until_full)
        producers = [m for m in methods[: step + 1] if m.computes]
        assert entry.output_half is producers[-1].shares_cfg
        assert entry.residual_half is [m for m in producers if m.refreshes][-1].shares_cfg
