"""Calibration from the command line: killed and started again, and shared by several processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from calibrate_target import STEPS
from processes import HERE, environment, launch, run

from difa_fx.plan import Plan

pytestmark = pytest.mark.slow


def command(output: Path, cache: Path, *, processes: int = 1) -> list[str]:
    settings = f"--steps {STEPS} --threshold 0.1 --window 8 --compiler eager --verify 0 --cache-dir {cache}"
    return [
        *(launch(processes) if processes > 1 else [sys.executable]),
        "-m",
        "difa_fx",
        "calibrate",
        "calibrate_target:make",
        *settings.split(),
        "-o",
        str(output),
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The plan that one undisturbed process finds."""
    folder = tmp_path_factory.mktemp("whole")
    text = run(command(folder / "plan.json", folder / "cache"))
    plan = Plan.load(folder / "plan.json")
    assert str(plan) in text
    assert len({method for row in plan.methods for method in row}) > 2
    return plan


def test_sigkill_at_any_moment_costs_a_step_at_most(whole: Plan, tmp_path: Path) -> None:
    cache, output = tmp_path / "cache", tmp_path / "plan.json"
    arguments = command(output, cache)
    killed = 0
    for steps in (1, 3):
        process = subprocess.Popen(
            arguments, env=environment(DIFA_TEST_SLEEP="0.5"), cwd=HERE, stderr=subprocess.DEVNULL, text=True
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and _rows(cache) < steps and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed == 2
    assert not output.exists()
    assert 3 <= _rows(cache) < STEPS
    run(arguments)
    assert Plan.load(output).methods == whole.methods
    assert Plan.load(output).provenance["calibration"]["losses"] == whole.provenance["calibration"]["losses"]


def _rows(cache: Path) -> int:
    """Most steps that a record holds; a record is whole at any moment."""
    found = [json.loads(path.read_text())["found"] for path in cache.glob("*.json")] if cache.exists() else []
    return max((len(item.get("rows", [])) for item in found), default=0)


def test_two_processes_find_the_plan_of_one(whole: Plan, tmp_path: Path) -> None:
    text = run(command(tmp_path / "plan.json", tmp_path / "cache", processes=2))
    assert text.count("plan.json: ") == 1
    shared = Plan.load(tmp_path / "plan.json")
    assert shared.methods == whole.methods
    assert shared.cfg == whole.cfg
    assert len(list((tmp_path / "cache").glob("*.json"))) == 1


EACH_RANK = """
import sys, torch.distributed as dist, difa_fx
from calibrate_target import STEPS, make
dist.init_process_group("gloo")
model, samples, sampler = make()
plan = difa_fx.calibrate(model, samples, num_inference_steps=STEPS, {goal}, window=8, sampler=sampler,
                         compiler="eager", cache_dir=sys.argv[1], verify=1, progress=False)
plan.save(f"{{sys.argv[2]}}/{{dist.get_rank()}}.json")
dist.destroy_process_group()
"""


@pytest.mark.thorough
@pytest.mark.parametrize("goal", ["target_speedup=1.01"])
def test_all_processes_have_the_same_plan(goal: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(EACH_RANK.format(goal=goal))
    run([*launch(2), str(script), str(tmp_path / "cache"), str(tmp_path)])
    assert Plan.load(tmp_path / "0.json") == Plan.load(tmp_path / "1.json")
