"""Plans: what is accepted, what is refused and with which words, and that files survive."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_fx.errors import DifaError, PlanError, PlanFileError
from difa_fx.plan import Method, Plan, as_plan, as_window, check_reads
from difa_fx.plan_io import MAX_FILE_BYTES

PLANS = Path(__file__).parent / "plans"
REAL = sorted(PLANS.glob("*.json"))
SITES = ("blocks.0.attn", "blocks.1.attn")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    steps = draw(st.integers(1, 6))
    sites = draw(st.lists(st.text(min_size=1), min_size=1, max_size=4, unique=True))
    cfg = draw(st.sampled_from([None, "cond_first", "uncond_first"]))
    allowed = [method for method in Method if cfg or not method.shares_cfg]
    row = st.lists(st.sampled_from(allowed), min_size=len(sites), max_size=len(sites))
    later = draw(st.lists(row, min_size=steps - 1, max_size=steps - 1))
    number = st.floats(-1e6, 1e6)
    return Plan(
        steps=steps,
        sites=sites,
        methods=[["full"] * len(sites), *later],
        window=draw(st.integers(0, 10_000)),
        cfg=cfg,
        denoiser=draw(st.none() | st.text(min_size=1)),
        timesteps=draw(st.none() | st.lists(number, min_size=steps, max_size=steps)),
        provenance=draw(st.dictionaries(st.text(), json_values, max_size=3)),
    )


def small(**changes: object) -> dict[str, object]:
    """A right plan as JSON, with changes."""
    fields: dict[str, object] = {
        "format": "difa.plan",
        "version": 1,
        "steps": 3,
        "cfg": None,
        "window": 8,
        "sites": list(SITES),
        "methods": [["full", "full"], ["window", "cached"], ["cached", "full"]],
    }
    return fields | changes


def check_message(error: DifaError, *words: str) -> None:
    """Every error says where, what is allowed and what to do; and these words."""
    text = str(error)
    for word in ("where: ", "allowed: ", "to do: ", *words):
        assert word in text, text


# What a plan is


@pytest.mark.parametrize(
    ("name", "shares", "computes", "windowed", "refreshes"),
    [
        ("full", False, True, False, True),
        ("window", False, True, True, False),
        ("cached", False, False, False, False),
        ("full+cfg", True, True, False, True),
        ("window+cfg", True, True, True, False),
    ],
)
def test_methods(name, shares, computes, windowed, refreshes):
    method = Method(name)
    assert (str(method), f"{method}", f"{method:>12}") == (name, name, f"{name:>12}")
    assert (method.shares_cfg, method.computes) == (shares, computes)
    assert (method.windowed, method.refreshes) == (windowed, refreshes)


def test_plan_is_immutable_and_equal_by_content():
    source = {"seeds": [1, 2], "by": {"who": "me"}}
    plan = Plan.from_dict(small(provenance=source))
    source["seeds"].append(3)
    assert plan.provenance["seeds"] == (1, 2)
    with pytest.raises(AttributeError):
        plan.window = 4
    with pytest.raises(TypeError):
        plan.provenance["by"]["who"] = "you"
    other = Plan.from_dict(small(provenance={"seeds": [1, 2], "by": {"who": "me"}}))
    assert plan == other
    assert len({plan, other, plan.replace(window=9)}) == 2
    assert plan.replace(window=9) != plan


def test_plan_survives_copy_and_pickle():
    plan = Plan.load(REAL[0])
    assert copy.deepcopy(plan) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_sequences_and_names_are_normalised():
    plan = Plan(steps=1, sites=["a"], methods=[["full"]], window=0, cfg=None, timesteps=[999])
    assert plan.sites == ("a",)
    assert plan.methods == ((Method.FULL,),)
    assert plan.timesteps == (999.0,)
    assert type(plan.timesteps[0]) is float


def test_looking_into_a_plan():
    plan = Plan.from_dict(small())
    assert plan.at(1) == {SITES[0]: Method.WINDOW, SITES[1]: Method.CACHED}
    assert plan.column(SITES[1]) == (Method.FULL, Method.CACHED, Method.FULL)
    assert plan.counts() == {
        Method.FULL: 3,
        Method.WINDOW: 1,
        Method.CACHED: 2,
        Method.FULL_CFG: 0,
        Method.WINDOW_CFG: 0,
    }
    assert not plan.uses_cfg
    assert str(plan) == ("any denoiser: 3 steps x 2 sites, window +-8: full 50%, window 17%, cached 33%")
    assert repr(plan) == f"<Plan {plan}>"


@pytest.mark.parametrize("step", [-1, 3, "1", None])
def test_a_step_outside_the_plan(step):
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(small()).at(step)
    check_message(caught.value, "0 to 2")


def test_a_site_outside_the_plan():
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(small()).column("blocks.1.atn")
    check_message(caught.value, "got: blocks.1.atn", "nearest: blocks.1.attn")


def test_check_sites():
    plan = Plan.from_dict(small())
    plan.check_sites([*SITES, "blocks.2.attn"])
    with pytest.raises(PlanError) as caught:
        plan.check_sites(["blocks.0.attn", "blocks.1.attn1"])
    check_message(caught.value, "1 of the plan's 2", "blocks.1.attn (nearest: blocks.1.attn1")
    with pytest.raises(PlanError, match="no site was found"):
        plan.check_sites([])
    many = Plan.full([f"a.{i}" for i in range(9)], steps=1)
    with pytest.raises(PlanError, match="and 6 more"):
        many.check_sites(["x"])


# The simple schedules


def test_uniform():
    plan = Plan.uniform(SITES, steps=7, every=3)
    assert [str(m) for m in plan.column(SITES[0])] == (["full", "cached", "cached", "full", "cached", "cached", "full"])
    late = Plan.uniform(SITES, steps=7, every=3, warmup=3, method="window", window=4)
    assert [str(m) for m in late.column(SITES[1])] == (["full", "full", "full", "window", "window", "full", "window"])
    assert late.window == 4


def test_full():
    plan = Plan.full(SITES, steps=4, denoiser="DiT")
    assert plan.counts()[Method.FULL] == 8
    assert plan.denoiser == "DiT"


@given(
    steps=st.integers(1, 30),
    every=st.integers(1, 10),
    warmup=st.integers(1, 40),
    method=st.sampled_from(list(Method)),
)
def test_uniform_is_always_valid(steps, every, warmup, method):
    plan = Plan.uniform(SITES, steps=steps, every=every, method=method, warmup=warmup, cfg="cond_first")
    column = plan.column(SITES[0])
    assert set(column[:warmup]) == {Method.FULL}
    assert set(column) <= {Method.FULL, method}


@pytest.mark.parametrize("changes", [{"every": 0}, {"warmup": 0}, {"steps": 0}, {"method": "ful"}, {"every": True}])
def test_uniform_refuses(changes):
    with pytest.raises(PlanError) as caught:
        Plan.uniform(SITES, **({"steps": 4, "every": 2} | changes))
    check_message(caught.value, next(iter(changes)))


# What is refused


@pytest.mark.parametrize(
    ("changes", "where", "words"),
    [
        ({"steps": 0}, "plan: steps", ["got: 0 (a whole number)"]),
        ({"steps": True}, "plan: steps", ["a boolean"]),
        ({"steps": "3"}, "plan: steps", ["'3' (text)"]),
        ({"steps": 4}, "plan: methods", ["3 rows", "4 rows"]),
        ({"window": -1}, "plan: window", []),
        ({"window": 1.5}, "plan: window", ["1.5 (a number)"]),
        ({"window": None}, "plan: window", ["got: null"]),
        ({"window": False}, "plan: window", []),
        ({"cfg": "cond"}, "plan: cfg", ["got: cond", "cond_first"]),
        ({"cfg": 1}, "plan: cfg", []),
        ({"cfg": []}, "plan: cfg", []),
        ({"sites": "blocks"}, "plan: sites", ["text"]),
        ({"sites": []}, "plan: sites", ["names no site"]),
        ({"sites": {"a": 1}}, "plan: sites", ["an object"]),
        ({"sites": ["a", ""]}, "plan: sites[1]", []),
        ({"sites": ["a", 3]}, "plan: sites[1]", []),
        ({"sites": ["a", "a"]}, "plan: sites[1]", ["twice", "sites[0]"]),
        ({"methods": None}, "plan: methods", ["got: null"]),
        ({"methods": [["full", "full"], "full", []]}, "plan: methods[1]", []),
        ({"methods": [["full", "full"], ["full"], []]}, "plan: methods[1]", ["1 methods"]),
        ({"methods": [["full", "ful"]]}, "plan: methods[0][1]", ["did you mean full"]),
        ({"methods": [["full", "zzz"]]}, "plan: methods[0][1]", ["window+cfg", "got: zzz"]),
        ({"methods": [["full", 7]]}, "plan: methods[0][1]", ["7 (a whole number)"]),
        ({"timesteps": [1, 2]}, "plan: timesteps", ["2 numbers", "3 numbers"]),
        ({"timesteps": [1, "2", 3]}, "plan: timesteps[1]", []),
        ({"timesteps": [1, True, 3]}, "plan: timesteps[1]", []),
        ({"timesteps": [1, float("nan"), 3]}, "plan: timesteps[1]", ["nan"]),
        ({"timesteps": [1, float("inf"), 3]}, "plan: timesteps[1]", []),
        ({"timesteps": [1, 10**400, 3]}, "plan: timesteps[1]", []),
        ({"timesteps": 3}, "plan: timesteps", []),
        ({"denoiser": ""}, "plan: denoiser", []),
        ({"denoiser": 3}, "plan: denoiser", []),
        ({"provenance": [1]}, "plan: provenance", []),
        ({"provenance": {"a": [1, object()]}}, "plan: provenance.a[1]", ["JSON"]),
        ({"provenance": {"a": float("inf")}}, "plan: provenance.a", []),
        ({"provenance": {3: 1}}, "plan: provenance, a key", []),
        ({"format": "difa.plans"}, "plan: format", ["allowed: difa.plan"]),
        ({"format": None}, "plan: format", ["got: null"]),
        ({"version": 2}, "plan: version", ["got: 2", "allowed: 1"]),
        ({"version": True}, "plan: version", []),
        ({"version": "1"}, "plan: version", ["'1' (text)"]),
        ({"step": 3}, "plan", ["got: step", "nearest: steps"]),
    ],
)
def test_wrong_fields(changes, where, words):
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(small(**changes))
    check_message(caught.value, f"where: {where}\n", *words)


@pytest.mark.parametrize("field", ["format", "version", "steps", "cfg", "window", "sites", "methods"])
def test_missing_fields(field):
    fields = small()
    del fields[field]
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(fields)
    check_message(caught.value, field)


@pytest.mark.parametrize("field", ["denoiser", "timesteps", "provenance"])
def test_optional_fields_may_be_null(field):
    assert Plan.from_dict(small(**{field: None})) == Plan.from_dict(small())


def test_endless_provenance():
    loop: dict[str, object] = {}
    loop["again"] = loop
    with pytest.raises(PlanError, match="nested too deep"):
        Plan.from_dict(small(provenance=loop))


def test_first_step_must_be_full():
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(small(cfg="cond_first", methods=[["full", "full+cfg"], *[["full"] * 2] * 2]))
    check_message(caught.value, "first step", "methods[0][1]", "got: full+cfg")


@pytest.mark.parametrize(("method", "what"), [("cached", "an output"), ("window", "a residual")])
def test_nothing_is_read_that_was_not_written(method, what):
    rows = [["full", method], ["full", "full"], ["full", "full"]]
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(small(methods=rows))
    check_message(caught.value, f"step 0 of {SITES[1]} reads {what} that was never written")


def test_check_reads_beyond_the_first_step():
    M = Method
    check_reads([[M.FULL_CFG], [M.WINDOW], [M.CACHED]], ["a"])
    with pytest.raises(PlanError, match="step 1 of b reads an output"):
        check_reads([[M.FULL], [M.CACHED, M.CACHED]], ["a", "b"])


def test_shared_cfg_needs_an_order():
    rows = [["full", "full"], ["full", "window+cfg"], ["full", "full"]]
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(small(methods=rows))
    check_message(caught.value, "methods[1][1]", "uncond_first")
    assert Plan.from_dict(small(methods=rows, cfg="uncond_first")).uses_cfg


def test_as_window():
    assert as_window(0) == 0
    with pytest.raises(PlanError, match="window"):
        as_window(-3)


# Files


@given(plan=plans())
@settings(max_examples=60, deadline=None)
def test_round_trip(plan, tmp_path_factory):
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded == plan
    assert hash(loaded) == hash(plan)


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_the_real_plans_are_saved_byte_for_byte(path, tmp_path):
    plan = Plan.load(path)
    assert (plan.steps, len(plan.sites), plan.window, plan.cfg) == (20, 28, 128, "cond_first")
    plan.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_there_are_two_real_plans():
    assert [path.name for path in REAL] == [
        "dit-xl-2-512_20steps_t0.05.json",
        "dit-xl-2-512_20steps_t0.15.json",
    ]


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(small()).encode())
    assert Plan.load(path) == Plan.from_dict(small())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["line 1, column 1", "end of file"]),
        (REAL[0].read_bytes()[:2000], ["not valid JSON", "line 42, column 128"]),
        (b'{"format": "difa.plan",\n "steps": }', ["line 2, column 11"]),
        (b"[1, 2]", ["not a JSON object", "a list"]),
        (b"null", ["not a JSON object", "got: null"]),
        (b'{"steps": 1, "steps": 2}', ["key twice", "steps"]),
        (b'{"window": NaN}', ["NaN"]),
        (b'{"window": -Infinity}', ["-Infinity"]),
        (b'{"steps": "\xff\xfe"}', ["not UTF-8", "byte 11"]),
        (pickle.dumps({"steps": 1}), ["pickle", "Plan.save"]),
        (b"PK\x03\x04rest", ["zip"]),
        (b"[" * 100_000, []),
        (b'{"steps": ' + b"9" * 10_000 + b"}", []),
        (b'{"block0": {"step0": "FULL_ATTN"}}', ["xDiT", "from_xdit"]),
        (json.dumps(small()).replace('"cached"', '"cachd"', 1).encode(), ["methods[1][1]"]),
    ],
)
def test_wrong_files(data, words, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(data)
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    check_message(caught.value, str(path), *words)


def test_a_file_of_100_megabytes_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("the file was opened"))
    with pytest.raises(PlanFileError) as caught:
        Plan.load(path)
    check_message(caught.value, "100,000,000 bytes", f"{MAX_FILE_BYTES:,}")


def test_no_file(tmp_path):
    with pytest.raises(PlanFileError) as caught:
        Plan.load(tmp_path / "no.json")
    check_message(caught.value, "No such file", "no.json")
    with pytest.raises(PlanFileError) as caught:
        Plan.load(tmp_path)
    check_message(caught.value, "folder")
    with pytest.raises(PlanFileError):
        Plan.load("a\0b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PlanFileError, match="not a plain file"):
        Plan.load(tmp_path / "pipe")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    old = Plan.from_dict(small())
    old.save(path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PlanFileError) as caught:
        old.replace(window=99).save(path)
    check_message(caught.value, "No space left", str(path))
    assert [item.name for item in tmp_path.iterdir()] == ["plan.json"]
    assert Plan.load(path) == old


def test_no_folder_to_save_in(tmp_path):
    with pytest.raises(PlanFileError) as caught:
        Plan.from_dict(small()).save(tmp_path / "no" / "plan.json")
    check_message(caught.value, "No such file")


def test_a_saved_plan_can_be_read_by_others_and_links_stay(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    mask = os.umask(0o022)
    try:
        Plan.from_dict(small()).save(real)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(real.stat().st_mode) == 0o644
    link.symlink_to(real)
    Plan.from_dict(small(window=3)).save(link)
    assert link.is_symlink()
    assert Plan.load(real).window == 3


def test_as_plan(tmp_path):
    plan = Plan.from_dict(small())
    plan.save(tmp_path / "plan.json")
    assert as_plan(plan) is plan
    for source in (small(), tmp_path / "plan.json", str(tmp_path / "plan.json")):
        assert as_plan(source) == plan
    for wrong in (None, 3, b"plan.json", [plan]):
        with pytest.raises(PlanError) as caught:
            as_plan(wrong)
        check_message(caught.value, "a path, a dict or a Plan")
    with pytest.raises(PlanError, match="JSON text"):
        as_plan(json.dumps(small()))


# xDiT

XDIT = {
    "block0": {"step0": "FULL_ATTN", "step1": "OUTPUT_SHARE", "step2": "FULL_ATTN_CFG_SHARE"},
    "block1": {
        "step0": "FULL_ATTN",
        "step1": "RESIDUAL_WINDOW_ATTN",
        "step2": "RESIDUAL_WINDOW_ATTN_CFG_SHARE",
    },
}


def test_xdit(tmp_path):
    plan = Plan.from_xdit(XDIT, window=64, cfg="uncond_first", denoiser="PixArt")
    assert plan.sites == ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
    assert [[str(m) for m in row] for row in plan.methods] == [
        ["full", "full"],
        ["cached", "window"],
        ["full+cfg", "window+cfg"],
    ]
    assert (plan.window, plan.denoiser) == (64, "PixArt")
    path = tmp_path / "xdit.json"
    path.write_text(json.dumps(XDIT, indent=2))
    assert Plan.from_xdit(path, window=64, cfg="uncond_first", denoiser="PixArt") == plan


def test_xdit_keeps_the_order_of_numbers():
    many = {f"block{i}": {f"step{j}": "FULL_ATTN" for j in range(11)} for i in range(12)}
    many["block10"]["step9"] = "OUTPUT_SHARE"
    shuffled = {k: dict(sorted(v.items())) for k, v in sorted(many.items())}
    plan = Plan.from_xdit(shuffled, window=1, site="b.{block}.attn")
    assert plan.column("b.10.attn")[9] is Method.CACHED
    assert plan.counts()[Method.CACHED] == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block1": {"step0": "FULL", "step1": "x", "step2": "x"}}, ["block1.step0", "FULL_ATTN"]),
        ({"block1": {"step0": 1, "step1": "x", "step2": "x"}}, ["block1.step0", "by name"]),
        ({"block1": {"step0": "CFG_SHARE", "step1": "x", "step2": "x"}}, ["got: CFG_SHARE"]),
        ({"block1": {"step0": "FULL_ATTN"}}, ["different numbers of steps", "block1"]),
        ({"block1": {"step0": "FULL_ATTN", "step2": "FULL_ATTN"}}, ["step2", "without a gap"]),
        ({"block1": {}}, ["block1"]),
        ({"block1": None}, ["block1", "got: null"]),
        ({"block3": {"step0": "FULL_ATTN"}}, ["block3", "without a gap"]),
    ],
)
def test_wrong_xdit(changes, words):
    with pytest.raises(PlanError) as caught:
        Plan.from_xdit(XDIT | changes, window=64, cfg="cond_first")
    check_message(caught.value, *words)


def test_xdit_needs_the_order_of_the_halves_and_a_pattern():
    with pytest.raises(PlanError, match="conditional one"):
        Plan.from_xdit(XDIT, window=64)
    with pytest.raises(PlanError, match="block's number"):
        Plan.from_xdit(XDIT, window=64, cfg="cond_first", site="blocks.attn")
