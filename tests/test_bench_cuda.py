"""What CUDA asks of the benchmark, as far as it shows without a device; and the command that runs there, tiny."""

from __future__ import annotations

import importlib.util
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmark_commands import FOLDER, command

from difa_fx import kernel_race
from difa_fx.bench import plan_race
from difa_fx.bench.children import compiled_by
from difa_fx.bench.plans import method_plan, methods_of, plan_keeping
from difa_fx.bench.settings import SETTLED, Settings, Size, without_graphs
from difa_fx.bench.shapes import make_subject
from difa_fx.bench.steps import MethodSteps, Snapshot
from difa_fx.cli import main as difa
from difa_fx.cost import kept
from difa_fx.errors import OptionError
from difa_fx.plan import Method, Plan

DIT = Size(shape="dit-xl-2-512", tiny=True)


# CUDA graphs


def test_what_runs_before_rounds_depends_on_cuda_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda = replace(DIT, device="cuda")
    assert Settings(mode="reduce-overhead").warmup_on(DIT) == 1
    assert Settings(mode="reduce-overhead").warmup_on(cuda) == SETTLED
    assert Settings(mode="max-autotune", warmup=5).warmup_on(cuda) == 5
    assert Settings(mode="max-autotune-no-cudagraphs").warmup_on(cuda) == Settings().warmup_on(cuda) == 1


def test_every_mode_has_one_without_graphs():
    modes = [None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
    assert [without_graphs(mode) for mode in modes] == [None, "default", None, *["max-autotune-no-cudagraphs"] * 2]
    with pytest.raises(OptionError, match="--mode"):
        Settings(mode="reduce-overheads")


def test_a_snapshot_brings_back_state_that_was_written_over():
    """As CUDA graphs do it, which read and write state in place."""
    subject = make_subject(DIT)
    methods = method_plan(subject, methods_of(subject, [m.value for m in Method]), 5)
    steps = MethodSteps(subject, compiled_by("difa", subject, methods.plan, "eager", None), methods, SETTLED)
    yielded = steps.prime()
    assert steps.runner.calls == SETTLED * methods.plan.steps
    places = {name: {k: v.data_ptr() for k, v in s.state.items()} for name, s in steps._snapshots.items()}
    for name in [*methods.steps, *reversed(methods.steps)]:
        for snapshot in steps._snapshots.values():
            for value in snapshot.state.values():
                value.fill_(torch.nan)
        steps.restore(name)
        assert {k: v.data_ptr() for k, v in steps._session.state.items()} == places[name]
        assert torch.equal(steps.run(name), yielded[name]), name


def test_without_graphs_state_is_not_copied():
    subject = make_subject(DIT)
    methods = method_plan(subject, methods_of(subject, ["cached"]), 5)
    steps = MethodSteps(subject, compiled_by("difa", subject, methods.plan, "eager", None), methods)
    steps.prime()
    assert not any(snapshot.values for snapshot in steps._snapshots.values())
    assert not Snapshot.of(steps._session).values


def test_a_peer_that_dynamo_gives_up_on_takes_no_other_along():
    subject = make_subject(DIT)
    other = plan_race.twin(subject.model)
    assert isinstance(other, type(subject.model))
    assert type(other).__name__ == type(subject.model).__name__
    assert type(other).forward.__code__ is not type(subject.model).forward.__code__
    assert torch.equal(*(model(**subject.arguments(subject.noise, 500))[0] for model in (other, subject.model)))


# The plan made to be timed


def maker():
    spec = importlib.util.spec_from_file_location("benchmark_plan", FOLDER / "plans" / "make.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_plan"] = module
    spec.loader.exec_module(module)
    return module


def test_the_plan_for_2k_is_what_its_maker_makes_and_keeps_what_it_says():
    made = maker()
    plan = Plan.load(made.OUTPUT)
    assert plan == made.make()
    shapes = {site: made.shape() for site in plan.sites}
    assert kept(plan, shapes, projections=True) == pytest.approx(0.24, abs=0.005)
    assert (plan.steps, len(plan.sites), plan.window, plan.cfg) == (20, 28, 2048, "uncond_first")
    assert set(plan.counts()) == set(Method)
    some = plan.sites[::2]
    fewer = plan.replace(sites=some, methods=[row[::2] for row in plan.methods])
    assert kept(fewer, {site: made.shape() for site in some}, projections=True) == pytest.approx(0.24, abs=0.01)


@pytest.mark.parametrize(("share", "steps"), [(0.2, 20), (0.3, 8)])
def test_a_plan_keeps_what_is_asked(share, steps):
    shape, sites = maker().shape(), [f"blocks.{index}" for index in range(12)]
    plan = plan_keeping(share, shape, sites=sites, steps=steps, window=2048, cfg="cond_first")
    assert kept(plan, dict.fromkeys(sites, shape), projections=True) == pytest.approx(share, abs=0.005)


def test_a_plan_cannot_keep_anything():
    with pytest.raises(OptionError, match="share"):
        plan_keeping(0.9, maker().shape(), sites=["a"], steps=20, window=2048, cfg="cond_first")


# The command


def stages_in(output: Path):
    module = command("cuda")
    options = module._options(["-o", str(output), "--tiny", "--device", "cpu"])
    return module, {stage.name: stage for stage in module.stages(options)}


BENCHES = ["dit-plan", "dit-methods", "dit-methods-1k", "pixart-2k", "dit-peers", "pixart-2k-tuned"]


@pytest.mark.parametrize("name", BENCHES)
def test_every_stage_is_a_command_that_runs(name, tmp_path):
    _, found = stages_in(tmp_path)
    assert found[name].command[1:4] == ("-m", "difa_fx", "bench")
    with torch.no_grad():
        assert difa(list(found[name].command[3:])) == 0
    (case, *_) = json.loads((tmp_path / f"{name}.json").read_text())["cases"]
    assert case["methods"] if name.startswith("dit-methods") else case["generation"]


def test_kernels_have_a_ceiling_and_an_error(tmp_path):
    _, found = stages_in(tmp_path)
    arguments = [*found["kernels"].command[2:], "-o", str(tmp_path / "kernels"), "--kernels", "sdpa", "--rounds", "1"]
    full, near, refresh = command("kernels").main(arguments)
    assert [row["step"] for row in (full, near, refresh)] == ["full", "sdpa", "sdpa, refresh"]
    assert 0 < near["share_of_ceiling"] < 1
    assert near["error"] < 0.02, "bfloat16"
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert record["ceilings"]["bytes_per_second"] > 0 and record["failed"] == {}


def test_a_kernel_that_fails_is_named_and_the_others_are_measured(tmp_path, monkeypatch):
    module = command("kernels")
    monkeypatch.setattr(kernel_race, "_compiled", lambda *_: 1 / 0)
    tiny = ["--tokens", "64", "--head-dims", "8", "--heads", "1", "--rounds", "1", "--kernels", "flex", "sdpa"]
    rows = module.main([*tiny, "-o", str(tmp_path / "kernels")])
    assert [row["step"] for row in rows] == ["full", "sdpa", "sdpa, refresh"]
    assert "- flex, 64 tokens, width 8 failed: ZeroDivisionError" in (tmp_path / "kernels.md").read_text()


def test_stages_do_not_break_each_other(tmp_path, monkeypatch):
    module, _ = stages_in(tmp_path)

    def stage(name: str, code: str, **settings):
        settings = {"needs": 0, "limit": 60, **settings}
        return module.Stage(name=name, what="", command=(sys.executable, "-c", code), **settings)

    together = f"import time; from pathlib import Path; here = Path({str(tmp_path)!r})"
    meet = f"{together}; (here / MINE).touch()\nwhile not (here / OTHER).exists(): time.sleep(0.05)"
    found = [
        stage("one", meet.replace("MINE", "'a'").replace("OTHER", "'b'"), alone=False),
        stage("two", meet.replace("MINE", "'b'").replace("OTHER", "'a'"), alone=False),
        stage("fails", "raise SystemExit('because')"),
        stage("instead", "", instead_of="fails"),
        stage("spare", "", instead_of="instead"),
        stage("hangs", "import time; print('begun', flush=True); time.sleep(60)", limit=1),
        stage("large", "", needs=1e6),
        stage("last", "import os; print(os.environ['MARK'])", environment={"MARK": "here"}),
    ]
    monkeypatch.setattr(module, "stages", lambda options: found)
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    (tmp_path / "cache" / "ab").mkdir(parents=True)
    (tmp_path / "cache" / "ab" / "x.best_config").touch()
    (tmp_path / "cache" / "difa-window-kernels.json").touch()
    (tmp_path / "cache" / "ab" / "x.py").touch()
    output, archive = tmp_path / "out", tmp_path / "out.tar.gz"
    outcomes = module.main(["-o", str(output), "--archive", str(archive)])
    assert {outcome.name: outcome.state for outcome in outcomes} == {
        "one": "ran",
        "two": "ran",
        "fails": "failed",
        "instead": "ran",
        "spare": "not needed",
        "hangs": "cut",
        "large": "no time left",
        "last": "ran",
    }
    assert {outcome.name: outcome.said for outcome in outcomes}["fails"] == "because"
    assert (output / "last.log").read_text() == "here\n"
    assert [path.name for path in (tmp_path / "cache").rglob("*.*")] == ["x.py"]
    assert "| hangs | cut | 1 | begun |" in (output / "stages.md").read_text()
    with tarfile.open(archive) as kept_files:
        assert "out/stages.json" in kept_files.getnames()


def test_stages_can_be_picked(tmp_path, capsys):
    module, _ = stages_in(tmp_path)
    with pytest.raises(SystemExit):
        module.main(["-o", str(tmp_path), "--stages", "pixart"])
    assert "pixart-2k-tuned" in capsys.readouterr().err
    assert module.main(["-o", str(tmp_path), "--list"]) == []
    listed = capsys.readouterr().out
    assert listed.index("tests:") < listed.index("dit-plan:") < listed.index("pixart-2k:") < listed.index("memory:")
