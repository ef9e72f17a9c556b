"""Random valid plans, for hypothesis."""

from __future__ import annotations

from compiled import make_plan
from hypothesis import strategies as st
from models import Case
from zoo import refused

from difa_fx.plan import Method, Plan


@st.composite
def plans(draw: st.DrawFn, found: Case) -> Plan:
    """Any valid plan of 3 to 6 steps: the first is full, the rest is what each site can do."""
    columns = []
    steps = draw(st.integers(3, 6))
    for site in found.sites:
        methods = [m.value for m in Method if m.value not in refused(found.name, site)]
        allowed = [m for m in methods if found.cfg_order or not m.endswith("+cfg")]
        columns.append(["full", *draw(st.lists(st.sampled_from(allowed), min_size=steps - 1, max_size=steps - 1))])
    rows = [list(row) for row in zip(*columns, strict=True)]
    return make_plan(found, rows, window=draw(st.integers(0, found.tokens + 1)))
