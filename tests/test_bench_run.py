"""``difa bench`` from one end to the other at tiny sizes; no time decides anything here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import difa_fx
from difa_fx.bench import Settings, children, run
from difa_fx.bench.attention_time import groups_of
from difa_fx.bench.children import compiled_by
from difa_fx.bench.plans import method_plan, methods_of
from difa_fx.bench.records import RESIDENT_AFTER, bench_from_dict
from difa_fx.bench.sampling import Denoiser, generate
from difa_fx.bench.settings import Size, size_json
from difa_fx.bench.shapes import SHAPES, make_subject
from difa_fx.bench.steps import MethodSteps
from difa_fx.cli import main
from difa_fx.errors import BenchmarkError
from difa_fx.plan import Method, Plan

PUBLISHED = Path(__file__).parent / "plans" / "dit-xl-2-512_20steps_t0.15.json"


@pytest.mark.parametrize("shape", SHAPES)
def test_built_in_denoisers_are_what_they_say(shape):
    subject = make_subject(Size(shape=shape, tiny=True))
    (report,) = difa_fx.inspect(subject.model, **subject.arguments(subject.noise, 500))
    assert tuple(site.path for site in report.sites) == subject.sites
    tokens = subject.size.tokens
    assert tokens is not None
    assert {site.tokens for site in report.sites} == {tokens + sum(subject.text)}
    assert all(Method.WINDOW.value in site.methods for site in report.sites)
    if subject.halves:
        assert all(len(site.methods) == len(Method) for site in report.sites)
    latents = generate(subject, Denoiser(subject.model), 2)
    assert latents.shape == subject.noise.shape
    assert bool(torch.isfinite(latents).all())


@pytest.mark.parametrize(
    ("shape", "layers", "tokens", "text"),
    [
        ("dit-xl-2-512", 28, 1024, 0),
        ("pixart-sigma-1024", 28, 4096, 0),
        ("pixart-sigma-2k", 28, 16384, 0),
        ("sd3-medium-1024", 24, 4096, 333),
        ("flux-dev-1024", 57, 4096, 512),
        ("wan-1.3b-480p", 30, 32760, 0),
    ],
)
def test_published_sizes(shape, layers, tokens, text):
    """Nothing is allocated: the denoiser lies on the meta device."""
    subject = make_subject(Size(shape=shape, device="meta", layers=None))
    assert (subject.size.layers, subject.size.tokens, sum(subject.text)) == (layers, tokens, text)
    assert len(subject.sites) == layers


@pytest.mark.parametrize("shape", ["dit-xl-2-512", "sd3-medium-1024", "wan-1.3b-480p"])
def test_a_step_can_be_run_again_and_again(shape):
    subject = make_subject(Size(shape=shape, tiny=True))
    methods = method_plan(subject, methods_of(subject, [m.value for m in Method]), 5)
    steps = MethodSteps(subject, compiled_by("difa", subject, methods.plan, "eager", None), methods)
    yielded = steps.prime()
    for name in [*reversed(methods.steps), *methods.steps]:
        steps.restore(name)
        assert torch.equal(steps.run(name), yielded[name]), name
    assert steps.state_bytes("full") == 0
    assert steps.state_bytes("cached") > 0
    assert steps.runner.calls == subject.calls_per_step * (methods.plan.steps + 2 * len(methods.steps))


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_by_itself_is_every_site_once(shape):
    subject = make_subject(Size(shape=shape, tiny=True, layers=3))
    groups = groups_of(subject, subject.arguments(subject.noise, 500))
    assert sorted(path for group in groups for path in group.paths) == sorted(subject.sites)
    assert len(groups) <= 2, "equal layers make one group"
    for group in groups:
        for module in group.modules:
            module(*group.arguments, **group.keywords)


PEERS_HERE = ("hooked", "hooked+compile", "fbcache+compile", "pab", "fastercache")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A whole run of the command on a tiny DiT, with a plan and peers."""
    output = tmp_path_factory.mktemp("bench") / "tiny"
    argv = ["bench", "dit-xl-2-512", "--tiny", "--compiler", "eager", "--rounds", "2", "--steps", "5"]
    argv += ["--plan", str(PUBLISHED), "--columns", "4,27", "--window", "5", "--processes", "0", "-o", str(output)]
    argv += ["--peers", *PEERS_HERE]
    with torch.no_grad():
        assert main(argv) == 0
    return output


def test_the_command_writes_everything(measured):
    names = sorted(path.name for path in measured.parent.iterdir())
    assert names == ["tiny-0-dit-xl-2-512.png", "tiny.json", "tiny.md"]
    bench = bench_from_dict(json.loads((measured.parent / "tiny.json").read_text()))
    (case,) = bench.cases
    assert case.window == 5
    assert case.methods is not None and case.generation is not None
    assert [row.name for row in case.methods.rows] == [
        *("eager", "inductor", "full", "refresh", "window", "cached", "full+cfg", "refresh+cfg", "window+cfg")
    ]
    assert set(case.left_out) == {"fastercache"}
    assert [row.name for row in case.generation.rows] == ["eager", "inductor", "plan", *PEERS_HERE[:-1]]
    table = (measured.parent / "tiny.md").read_text()
    assert all(row.label in table for row in (*case.methods.rows, *case.generation.rows))


def test_the_records_numbers_belong_together(measured):
    (case,) = bench_from_dict(json.loads((measured.parent / "tiny.json").read_text())).cases
    methods, generation = case.methods, case.generation
    assert methods is not None and generation is not None
    assert methods.row("full").relative_l1 == pytest.approx(0, abs=1e-5)
    assert methods.row("cached").relative_l1 > 0
    assert methods.row("cached").kept == 0
    assert methods.row("full+cfg").kept == pytest.approx(0.5)
    assert methods.row("full").efficiency is None, "there is nothing to save"
    assert methods.row("cached").efficiency is not None
    assert methods.row("refresh").to_full is not None
    assert methods.row("inductor").speedup.median == 1
    plan, by_hooks = generation.row("plan"), generation.row("hooked")
    assert plan.relative_l1 == pytest.approx(by_hooks.relative_l1, rel=1e-3)
    assert plan.kept == by_hooks.kept
    assert plan.graphs == 1, "one graph, whatever the plan"
    assert generation.row("hooked+compile").graphs > 1
    assert by_hooks.state_bytes is not None and plan.state_bytes is not None
    assert 0 < plan.state_bytes <= by_hooks.state_bytes, "halves are kept as halves"
    ideal = methods.row("inductor").seconds.median - methods.attention_seconds.median
    assert methods.row("cached").ideal_seconds == pytest.approx(ideal, rel=0.5), "medians of two rounds"


@pytest.mark.parametrize("shape", ["flux-dev-1024", "wan-1.3b-480p", "sd3-medium-1024"])
def test_other_denoisers_run_whole(shape):
    subject = make_subject(Size(shape=shape, tiny=True))
    plan = Plan.uniform(subject.sites, steps=4, every=2, method="window", window=5, cfg=subject.cfg)
    settings = Settings(plan=plan, peers=("hooked",), rounds=1, processes=0, compiler="eager")
    (case,) = run([Size(shape=shape, tiny=True)], settings).cases
    assert case.generation is not None and case.methods is not None
    rows = case.generation
    assert rows.row("plan").relative_l1 == pytest.approx(rows.row("hooked").relative_l1, rel=1e-2, abs=1e-6)
    assert ("full+cfg" in case.left_out) == (subject.cfg is None)
    assert case.compiled == ()


@pytest.mark.slow
def test_with_the_compiler_that_users_have():
    settings = Settings(methods=("full", "cached"), rounds=1, processes=0, eager=False)
    (case,) = run([Size(shape="dit-xl-2-512", tiny=True, layers=1)], settings).cases
    assert case.methods is not None
    assert case.methods.row("full").relative_l1 == pytest.approx(0, abs=1e-5)
    assert case.methods.row("cached").relative_l1 > 1e-5


@pytest.mark.thorough
def test_processes_of_their_own():
    settings = Settings(methods=(), processes=1, eager=False)
    (case,) = run([Size(shape="dit-xl-2-512", tiny=True, layers=1)], settings).cases
    inductor, planned = case.compiled
    assert (inductor.name, planned.name) == ("inductor", "difa")
    assert inductor.cold_to_inductor is not None and inductor.cold_to_inductor.median == 1
    assert inductor.peak_bytes != planned.peak_bytes, "each has memory of its own"
    for row in case.compiled:
        assert row.cold_seconds is not None and row.warm_seconds is not None
        assert 0 < row.warm_seconds.median < row.cold_seconds.median, "the second process finds the first one's work"


@pytest.mark.parametrize("contender", ["eager", "inductor", "difa"])
@pytest.mark.parametrize("shape", ["dit-xl-2-512", "wan-1.3b-480p"])
def test_what_a_process_answers(shape, contender, capsys):
    subject = make_subject(Size(shape=shape, tiny=True))
    plan = method_plan(subject, methods_of(subject, ["full+cfg"]), 5).plan
    spec = {"size": size_json(subject.size), "contender": contender, "plan": plan.to_dict()}
    children.main([json.dumps({**spec, "compiler": "eager", "mode": None, "steps": plan.steps})])
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["compile_seconds"] == pytest.approx(answer["first_seconds"] - answer["second_seconds"])
    assert answer["peak_of"] == RESIDENT_AFTER
    assert answer["peak_bytes"] > 2**26, "torch alone is larger"


def test_a_process_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    subject = make_subject(Size(shape="dit-xl-2-512", tiny=True))
    plan = Plan.full(subject.sites, steps=1, cfg=subject.cfg)
    with pytest.raises(BenchmarkError, match="--processes 0"):
        children.compare(subject.size, Settings(compiler="eager"), plan)
