"""attach and detach on real diffusers pipelines, and the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from digits import FOLDER, generate, load_pipeline

import difa_fx
from difa_fx import cli
from difa_fx.errors import AttachError, OptionError, PlanError
from difa_fx.plan import Plan

SITES = [f"transformer_blocks.{i}.attn1" for i in range(6)]
PLAN = Plan(
    steps=4,
    sites=SITES,
    methods=[["full"] * 6, ["cached"] * 6, ["full+cfg"] * 6, ["cached"] * 6],
    window=128,
    cfg="cond_first",
)


def test_attach_generates_under_the_plan_and_detach_undoes_it() -> None:
    pipe = load_pipeline()
    plain = generate(pipe, [3, 7], seed=0, steps=4)
    assert difa_fx.attach(pipe, PLAN, compiler="eager", mode="max-autotune") is pipe
    first = generate(pipe, [3, 7], seed=0, steps=4)
    again = generate(pipe, [3, 7], seed=0, steps=4)
    (stats,) = difa_fx.stats(pipe.transformer)
    assert stats.calls == 8
    assert stats.state_bytes == 0
    assert torch.equal(first, again)
    assert not torch.allclose(first, plain, atol=1e-3)
    difa_fx.detach(pipe)
    assert "set_timesteps" not in vars(pipe.scheduler)
    assert torch.equal(generate(pipe, [3, 7], seed=0, steps=4), plain)


def test_another_number_of_steps_is_refused_before_anything_is_generated() -> None:
    pipe = difa_fx.attach(load_pipeline(), PLAN, compiler="eager")
    with pytest.raises(PlanError, match="another number of steps"):
        generate(pipe, [1], seed=0, steps=10)
    assert difa_fx.stats(pipe.transformer) == ()


def test_an_interrupted_pipeline_leaves_nothing() -> None:
    pipe = difa_fx.attach(load_pipeline(), PLAN, compiler="eager")
    expected = generate(pipe, [4], seed=0, steps=4)
    step, count = pipe.scheduler.step, 0

    def stop(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    pipe.scheduler.step = stop
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, [8], seed=5, steps=4)
    pipe.scheduler.step = step
    assert torch.equal(generate(pipe, [4], seed=0, steps=4), expected)


def test_two_pipelines_may_share_a_denoiser_in_turn() -> None:
    one, other = load_pipeline(), load_pipeline()
    other.transformer = one.transformer
    difa_fx.attach(one, PLAN, compiler="eager")
    difa_fx.attach(other)
    expected = generate(one, [4], seed=0, steps=4)
    assert torch.equal(generate(other, [4], seed=0, steps=4), expected)
    assert torch.equal(generate(one, [4], seed=0, steps=4), expected)


def test_faults_of_attaching() -> None:
    pipe = load_pipeline()
    with pytest.raises(AttachError, match="not attached"):
        difa_fx.detach(pipe)
    with pytest.raises(AttachError, match="not compiled"):
        difa_fx.attach(pipe)
    with pytest.raises(OptionError, match="kompiler"):
        difa_fx.attach(pipe, PLAN, kompiler="eager")
    with pytest.raises(AttachError, match="no denoiser"):
        difa_fx.attach(object(), PLAN)
    difa_fx.attach(pipe, PLAN, compiler="eager")
    with pytest.raises(AttachError, match="already"):
        difa_fx.attach(pipe, PLAN)


def test_inspect_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(FOLDER), "--random-weights"]) == 0
    printed = capsys.readouterr().out
    assert all(site in printed for site in SITES)
    assert "window+cfg" in printed
    assert "timestep: timestep" in printed


def test_show_and_its_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert cli.main(["show", str(tmp_path / "plan.json")]) == 0
    assert "step 1  ......" in capsys.readouterr().out
    assert cli.main(["show", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err


def test_the_backend_needs_no_import(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    code = (
        "import sys, torch; m = torch.nn.Linear(2, 2).eval(); "
        "c = torch.compile(m, backend='difa', options={'compiler': 'eager'}); "
        "print(torch.no_grad()(c)(torch.ones(1, 2)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "torch.Size([1, 2])" in done.stdout
