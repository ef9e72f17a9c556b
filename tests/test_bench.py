"""The parts of ``difa bench`` that need no denoiser: rounds, ratios, efficiency, settings, plans, tables."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difa_fx.bench import command
from difa_fx.bench.efficiency import efficiencies, kept_share, savable
from difa_fx.bench.plans import fitted_plan, method_plan, methods_of, window_of
from difa_fx.bench.plots import draw
from difa_fx.bench.records import RESIDENT_AFTER, Bench, Case, Compiled, Race, Row, bench_from_dict
from difa_fx.bench.report import markdown
from difa_fx.bench.settings import Settings, Size
from difa_fx.bench.shapes import make_subject
from difa_fx.bench.subject import timesteps
from difa_fx.bench.timing import Contender, Spread, interleaved, ratios
from difa_fx.cost import SiteShape, projection_flops
from difa_fx.errors import OptionError
from difa_fx.hardware import hardware, machine_line, versions
from difa_fx.plan import Method, Plan

PLANS = Path(__file__).parent / "plans"
PUBLISHED = PLANS / "dit-xl-2-512_20steps_t0.15.json"


# Rounds


def test_contenders_take_turns_in_rotating_order():
    ran: list[str] = []
    names = ["a", "b", "c"]
    contenders = [Contender(n, lambda n=n: ran.append(n), lambda n=n: ran.append(f"({n})")) for n in names]
    seconds = interleaved(contenders, rounds=2, warmup=1, cuda=False)
    assert "".join(ran) == "(a)a(b)b(c)c" + "(b)b(c)c(a)a" + "(c)c(a)a(b)b"
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    assert all(value > 0 for found in seconds.values() for value in found)


def test_ratios_are_of_rounds_and_spreads_of_ratios():
    spread = Spread.of(ratios([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]))
    assert spread == Spread(median=3.0, least=2.0, largest=4.0)


# Efficiency


@pytest.mark.parametrize(
    ("tokens", "window", "full_cfg", "window_cfg"),
    [(1024, 0.77, 0.50, 0.38), (4096, 0.51, 0.50, 0.26), (16384, 0.33, 0.50, 0.16)],
)
def test_kept_shares_are_the_papers(tokens, window, full_cfg, window_cfg):
    """DiTFastAttn's table of single methods: operations of the whole attention module, window +- tokens/8."""
    shape = SiteShape(batch=2, heads=16, tokens=tokens, head_dim=72, projection_flops=projection_flops(2, tokens, 1152))
    share = {m: kept_share(shape, m, tokens // 8) for m in Method}
    assert share[Method.FULL] == 1
    assert share[Method.CACHED] == 0
    assert share[Method.WINDOW] == pytest.approx(window, abs=0.012)
    assert share[Method.FULL_CFG] == pytest.approx(full_cfg, abs=0.01)
    assert share[Method.WINDOW_CFG] == pytest.approx(window_cfg, abs=0.012)


@pytest.mark.parametrize(("cfg", "calls"), [("cond_first", 1), ("cond_call_first", 2)])
def test_what_can_be_saved_adds_up_over_sites_steps_and_calls(cfg, calls):
    shapes = {site: SiteShape(batch=2, heads=1, tokens=8, head_dim=4) for site in "ab"}
    rows = [["full", "full"], ["cached", "full"], ["full+cfg", "cached"]]
    plan = Plan(steps=3, sites=("a", "b"), methods=rows, window=1, cfg=cfg)
    seconds = {"a": 1.0, "b": 10.0}
    assert savable(plan, [0], shapes, seconds) == 0
    assert savable(plan, [1], shapes, seconds) == pytest.approx(calls * 1.0)
    assert savable(plan, [0, 1, 2], shapes, seconds) == pytest.approx(calls * (1.0 + 0.5 + 10.0))


def test_efficiency_is_one_where_time_goes_with_operations():
    assert efficiencies([10.0, 20.0], [6.0, 14.0], [4.0, 8.0]) == [1.0, 0.75]
    assert efficiencies([10.0], [10.0], [0.0]) is None


# Settings and plans


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"methods": ("half",)}, "--methods"),
        ({"peers": ("hooked",)}, "--peers"),
        ({"compiler": "gcc"}, "--compiler"),
        ({"rounds": 0}, "--rounds"),
    ],
)
def test_wrong_settings_are_named(settings, named):
    with pytest.raises(OptionError, match=named):
        Settings(**settings)


@pytest.mark.parametrize(
    ("size", "named"),
    [
        ({"shape": "dit"}, "dit-xl-2-512"),
        ({"shape": "dit-xl-2-512", "tokens": 60}, "49, 64"),
        ({"shape": "dit-xl-2-512", "batch": 3}, "2, 4, 6"),
        ({"shape": "wan-1.3b-480p", "tokens": 70}, "multiples of 16"),
        ({"shape": "dit-xl-2-512", "dtype": "int8"}, "--dtype"),
        ({"shape": "dit-xl-2-512", "layers": 0}, "--layers"),
    ],
)
def test_wrong_sizes_are_named(size, named):
    with pytest.raises(OptionError, match=named):
        make_subject(Size(**size, tiny=True))


def test_every_method_stands_once_behind_what_it_reads():
    subject = make_subject(Size(shape="dit-xl-2-512", tiny=True))
    found = method_plan(subject, methods_of(subject, [m.value for m in Method]), 8)
    column = [row[0].value for row in found.plan.methods]
    assert {name: column[step] for name, step in found.steps.items()} == {
        "full": "full",
        "refresh": "full",
        "window": "window",
        "cached": "cached",
        "full+cfg": "full+cfg",
        "refresh+cfg": "full+cfg",
        "window+cfg": "window+cfg",
    }
    assert column[found.steps["refresh"] + 1] == "window", "what it writes is read"
    assert column[found.steps["full"] + 1] == "full", "what it does not write is not read"


def test_without_guidance_there_is_no_cfg_method():
    subject = make_subject(Size(shape="flux-dev-1024", tiny=True))
    methods = methods_of(subject, [m.value for m in Method])
    assert methods == (Method.FULL, Method.WINDOW, Method.CACHED)
    assert set(method_plan(subject, methods, 8).steps) == {"full", "refresh", "window", "cached"}


def test_columns_of_a_plan_fit_a_denoiser_with_fewer_sites():
    plan = Plan.load(PUBLISHED)
    subject = make_subject(Size(shape="pixart-sigma-1024", tiny=True))
    found = fitted_plan(plan, subject, columns=(4, 27), steps=None, window=None)
    assert found.sites == subject.sites
    assert [row[1] for row in found.methods] == list(plan.column("transformer_blocks.27.attn1"))
    assert (found.cfg, found.window, found.steps) == ("uncond_first", 128, 20)
    assert found.timesteps == tuple(map(float, timesteps(20)))
    shorter = fitted_plan(plan, subject, columns=(4, 27), steps=5, window=3)
    assert (shorter.steps, shorter.window, len(shorter.timesteps or ())) == (5, 3, 5)
    flux = make_subject(Size(shape="flux-dev-1024", tiny=True))
    assert not fitted_plan(plan, flux, columns=(4, 27), steps=None, window=None).uses_cfg


@pytest.mark.parametrize("columns", [None, (1,), (1, 28)])
def test_a_plan_that_does_not_fit_is_an_error(columns):
    subject = make_subject(Size(shape="dit-xl-2-512", tiny=True))
    with pytest.raises(OptionError, match="each from 0 to 27"):
        fitted_plan(Plan.load(PUBLISHED), subject, columns=columns, steps=None, window=None)


def test_a_window_is_a_number_or_an_eighth():
    subject = make_subject(Size(shape="dit-xl-2-512", tiny=True))
    assert [window_of(asked, subject) for asked in (None, "n/8", "5", 0)] == [8, 8, 5, 0]
    with pytest.raises(OptionError, match="n/8"):
        window_of("wide", subject)


@given(st.integers(1, 100))
def test_timesteps_fall_from_999(steps):
    found = timesteps(steps)
    assert found[0] == 999
    assert list(found) == sorted(set(found), reverse=True)
    assert found[-1] >= 0


# Records, tables, figures


def example() -> Bench:
    """A record with something in every field."""
    spread = Spread(0.5, 0.25, 0.75)
    rows = (
        Row(name="inductor", label="Inductor", seconds=spread, speedup=Spread(1.0, 1.0, 1.0), kept=1.0),
        Row(
            name="window",
            label="difa, window",
            seconds=spread,
            speedup=Spread(1.25, 1.0, 1.5),
            efficiency=spread,
            efficiency_of_full=spread,
            to_full=spread,
            kept=0.77,
            ideal_seconds=0.375,
            state_bytes=2**20,
            relative_l1=0.125,
            graphs=3,
            graph_breaks=2,
            gave_up=1,
        ),
    )
    race = Race(rounds=3, steps=1, attention_seconds=spread, attention_share=spread, rows=rows)
    compiled = tuple(
        Compiled(
            name=name,
            cold_seconds=spread,
            warm_seconds=None,
            cold_to_inductor=spread,
            warm_to_inductor=None,
            peak_bytes=2**30,
            peak_of=RESIDENT_AFTER,
        )
        for name in ("inductor", "difa")
    )
    sizes = [Size(shape="dit-xl-2-512", layers=2, batch=2, tokens=tokens) for tokens in (64, 256)]
    cases = tuple(
        Case(
            size={name: getattr(size, name) for name in Size.__slots__},
            sites=2,
            text_tokens=0,
            window=8,
            plan="a plan",
            methods=race,
            generation=race,
            compiled=compiled,
            left_out={"pab": "it cannot"},
        )
        for size in sizes
    )
    return Bench(hardware=hardware(), versions=versions(), settings=Settings().as_json(), cases=cases)


def test_a_record_survives_json():
    bench = example()
    again = bench_from_dict(json.loads(json.dumps(bench.to_dict())))
    assert again.cases == bench.cases
    assert again.cases[0].methods is not None
    assert again.cases[0].methods.row("window").speedup == Spread(1.25, 1.0, 1.5)


def test_tables_say_what_a_ratio_is_to():
    text = markdown(example())
    assert "| difa, window | 500 | 2 | 1.25 (1.00 - 1.50) | 77% | 375 | 0.50 (0.25 - 0.75) |" in text
    assert "speed-up over Inductor" in text
    assert "| difa | 0.5 | 0.50 (0.25 - 0.75) |  |  | 1024 |" in text
    assert "3 / 2 / 1" in text
    assert "- pab: it cannot" in text
    assert {len(line.split("|")) for line in text.splitlines() if line.startswith("| difa, window")} == {14}


def test_figures_are_written(tmp_path):
    paths = draw(example(), tmp_path / "bench")
    assert sorted(p.name for p in paths) == sorted(p.name for p in tmp_path.iterdir())
    assert [p.name for p in paths] == [
        "bench-0-dit-xl-2-512.png",
        "bench-1-dit-xl-2-512.png",
        "bench-tokens-dit-xl-2-512.png",
    ]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)


# The command line


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", *argv])


def test_the_command_line_makes_sizes_and_settings(tmp_path):
    arguments = parsed(
        *("dit-xl-2-512", "flux-dev-1024", "-o", str(tmp_path / "x"), "--tokens", "64", "256", "--batch", "2"),
        *("--plan", str(PUBLISHED), "--columns", "4, 27", "--peers", "all", "--layers", "2"),
    )
    sizes, settings = command.sizes_of(arguments), command.settings_of(arguments)
    assert [(size.shape, size.tokens) for size in sizes] == [
        ("dit-xl-2-512", 64),
        ("dit-xl-2-512", 256),
        ("flux-dev-1024", 64),
        ("flux-dev-1024", 256),
    ]
    assert settings.columns == (4, 27)
    assert len(settings.peers) == 8


@pytest.mark.parametrize(
    ("argv", "named"), [(["--columns", "a,b"], "--columns"), (["--peers", "hooked"], "--plan"), ([], "--output")]
)
def test_the_command_line_names_what_is_wrong(argv, named, tmp_path):
    with pytest.raises(OptionError, match=named):
        command.run(
            parsed("dit-xl-2-512", "-o", str(tmp_path / "missing" / "x" if not argv else tmp_path / "x"), *argv)
        )


def test_what_tunes_the_allocator_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": "/bin"})
    assert "environment" not in hardware()
    monkeypatch.setattr(os, "environ", {"PATH": "/bin", "MALLOC_MMAP_MAX_": "0"})
    assert hardware()["environment"] == {"MALLOC_MMAP_MAX_": "0"}
    assert machine_line(hardware()).endswith(f"{hardware()['threads']} threads, MALLOC_MMAP_MAX_=0")
