"""``difa`` on whatever it is given: an error of a few lines, and never a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from difa_fx import __version__, cli
from difa_fx.errors import DifaError, PlanError, printable
from difa_fx.options import parse_options
from difa_fx.plan import Plan

HERE = Path(__file__).parent
HUGE = 10**5000
BOMB: list[Any] = []
for _ in range(60):
    BOMB = [BOMB, BOMB]


def difa(*argv: str) -> int:
    """The command's exit status; argparse leaves by an exception."""
    try:
        return cli.main(argv)
    except SystemExit as left:
        return int(left.code or 0)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets are importable from where these tests are."""
    monkeypatch.chdir(HERE)


def folder(tmp_path: Path, config: object) -> str:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    return str(tmp_path)


CONFIGS: list[Any] = [
    [],
    3,
    "not JSON",
    {},
    {"_class_name": 7},
    {"_class_name": None},
    {"_class_name": ""},
    {"_class_name": "__doc__"},
    {"_class_name": "logging"},
    {"_class_name": "DDIMScheduler"},
    {"_class_name": "NoSuchModel"},
    {"_class_name": "Dit\u001b[31m\ud800"},
    {"_class_name": "DiTTransformer2DModel", "num_layers": "many"},
    {"_class_name": "DiTTransformer2DModel", "sample_size": -3},
    {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 0},
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("weights", [["--random-weights"], []])
def test_a_config_of_another_form(
    config: object, weights: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert difa("inspect", folder(tmp_path, config), *weights) == 1
    told(capsys)


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """What was told of a fault, in lines that a terminal can show."""
    err = capsys.readouterr().err
    assert err.startswith(("difa: ", "usage: "))
    assert "Traceback" not in err
    assert err == printable(err)
    return err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["inspect", "command_targets:raises"], r"the target raised an error.*ZeroDivisionError: no\\x1b\[31m luck"),
        (["inspect", "command_targets:exits"], "the target raised an error.*SystemExit: 7"),
        (["inspect", "command_targets:nothing"], "the target returned something else"),
        (["inspect", "command_targets:missing"], "the target cannot be loaded"),
        (["inspect", "no_such_module:f"], "the target cannot be loaded"),
        (["inspect", "command_targets:faulty_denoiser"], "the denoiser does not run on these inputs"),
        (["inspect", "no/such\x1b[31m/folder\udc80"], "no diffusers denoiser can be loaded"),
        (["calibrate", "command_targets:raises", "--steps", "4", "--threshold", "0.1", "-o", "x"], "ZeroDivisionError"),
        (["calibrate", "no/folder", "--samples", "²", "--steps", "4", "--threshold", "1", "-o", "x"], "no diffusers"),
        (["calibrate", "x", "--samples-file", ".", "--steps", "4", "--threshold", "1", "-o", "x"], "cannot be read"),
        (["show", "no\x1b[2J.json"], "cannot be read"),
        (["show", "\udcff.json"], "cannot be read"),
        (["evaluate", "no/folder"], "no/folder"),
        (["evaluate", ".", "--features", "command_targets:raises"], "ZeroDivisionError"),
        (["evaluate", ".", "--features", "odd"], "the network cannot be loaded"),
        (["bench", "no-such-shape", "-o", "/tmp/x"], "no-such-shape"),
    ],
)
def test_a_fault_is_told(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    assert difa(*argv) == 1
    assert re.search(words, told(capsys), re.DOTALL)


@pytest.mark.parametrize(
    "argv",
    [
        ["inspect", "x", "--batch", "0"],
        ["inspect", "x", "--batch", "-2"],
        ["inspect", "x", "--batch", "9" * 6000],
        ["calibrate", "x", "--steps", "zero", "--threshold", "1", "-o", "x"],
        ["calibrate", "x", "--steps", "0", "--threshold", "1", "-o", "x"],
        ["bench", "dit-xl-2-512", "-o", "x", "--layers", "0"],
        ["\x1b[31m"],
        ["show", "x", "--\x1b[31mwhat\udc80"],
        [],
    ],
)
def test_a_wrong_argument_is_told(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert difa(*argv) == 2
    assert len(told(capsys)) < 3000


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert difa("--version") == 0
    assert capsys.readouterr().out.strip() == f"difa_fx {__version__}"


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert difa("inspect", "folder") == 1
    assert "pip install diffusers" in told(capsys)
    calibrate = ("calibrate", "folder", "--samples", "a", "--steps", "4", "--threshold", "1", "-o", "x")
    assert difa(*calibrate) == 1
    assert "pip install diffusers" in told(capsys)
    assert difa("inspect", "command_targets:denoiser") == 0


def test_an_interrupt_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate = ("calibrate", "command_targets:interrupted", "--steps", "4", "--threshold", "1", "-o", "x")
    assert difa(*calibrate) == 130
    assert "the same command goes on where it was" in told(capsys)


def test_what_nobody_foresaw_is_told_and_shown_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(path: object) -> Plan:
        raise ArithmeticError("unforeseen")

    monkeypatch.setattr(Plan, "load", fault)
    assert difa("show", "x") == 1
    assert "ArithmeticError: unforeseen" in told(capsys)
    monkeypatch.setenv("DIFA_TRACEBACK", "1")
    with pytest.raises(ArithmeticError):
        difa("show", "x")


def test_names_in_a_plan_do_not_reach_the_terminal_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan.full(["a\x1b]0;owned\x07"], steps=2, denoiser="\x1b[2J\ud800")
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_dict()), encoding="utf-8")
    assert difa("show", str(path)) == 0
    out = capsys.readouterr().out
    assert "\\x1b[2J" in out and "\x1b" not in out


def process(*argv: str, **settings: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "difa_fx", *argv], cwd=HERE, stderr=subprocess.PIPE, **settings)


def test_a_pipe_that_nobody_reads(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Plan.full([f"site {i}" for i in range(50)], steps=2000).save(path)
    read, write = os.pipe()
    os.close(read)
    done = process("show", str(path), stdout=write)
    os.close(write)
    _, err = done.communicate(timeout=120)
    assert (done.returncode, err) == (141, b"")


def test_closed_streams(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Plan.full(["site"], steps=2).save(path)
    for closed in ("1>&-", "2>&-", "1>&- 2>&-"):
        command = f'exec "{sys.executable}" -m difa_fx show "{path}" {closed}'
        done = subprocess.run(["bash", "-c", command], capture_output=True, cwd=HERE, timeout=120)
        assert done.returncode == 0, closed
        assert b"Traceback" not in done.stderr


def test_a_real_interrupt(tmp_path: Path) -> None:
    fifo = tmp_path / "slow.py"
    fifo.write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n", encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    running = process("inspect", "slow:f", stdout=subprocess.PIPE, env=env)
    assert running.stdout is not None
    assert running.stdout.readline() == b"ready\n"
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert b"interrupted" in err and b"Traceback" not in err


# Plans as Python values


class Odd:
    """Compares and shows itself badly."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("ambiguous")

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


ODD: dict[str, Any] = {
    "huge": HUGE,
    "negative": -HUGE,
    "nan": float("nan"),
    "array": np.zeros(3),
    "empty array": np.zeros(0),
    "numpy float": np.float64(3),
    "numpy int": np.int64(2),
    "tensor": torch.ones(2),
    "odd": Odd(),
    "bytes": b"x",
    "long": range(10**12),
    "bomb": BOMB,
    "surrogate": "\ud800",
    "number as key": {1: 2},
    "huge key": {HUGE: 1},
    "odd grid": {"grid": np.ones(2), "size": HUGE},
    "mixed keys": {"grid": [1, 1], 3: 1},
    "type": object,
    "boolean": True,
    "none": None,
    "list": [HUGE, Odd(), np.ones(2), "\x1b[2J", BOMB],
    "lists": [[np.zeros(2), HUGE], [Odd(), BOMB]],
}

FIELDS = ("format", "version", "steps", "sites", "methods", "window", "cfg", "denoiser", "timesteps", "provenance")


def typed_or_right(call: Callable[[], Any]) -> Any:
    """What ``call`` gives; None where it raises an error of ours that a terminal can show, in a few lines."""
    try:
        return call()
    except DifaError as error:
        text = str(error)
    assert len(text) < 3000
    assert text.encode("utf-8").decode() == printable(text)
    return None


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("field", FIELDS)
def test_odd_values_in_a_plan_are_typed_errors(field: str, name: str) -> None:
    fields: dict[str, Any] = Plan.full(["a", "b"], steps=2).to_dict()
    plan = typed_or_right(lambda: Plan.from_dict({**fields, field: ODD[name]}))
    if plan is not None:
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


CALLS: dict[str, Callable[[Any], Any]] = {
    "uniform steps": lambda v: Plan.uniform(["a"], steps=v, every=2),
    "uniform every": lambda v: Plan.uniform(["a"], steps=4, every=v),
    "uniform sites": lambda v: Plan.uniform(v, steps=4, every=2),
    "for_steps": lambda v: Plan.full(["a"], steps=4).for_steps(v),
    "for_steps timesteps": lambda v: Plan.full(["a"], steps=4).for_steps(4, timesteps=v),
    "at": lambda v: Plan.full(["a"], steps=4).at(v),
    "column": lambda v: Plan.full(["a"], steps=4).column(v),
    "xdit": lambda v: Plan.from_xdit({"block0": v}, window=4),
    "xdit cell": lambda v: Plan.from_xdit({"block0": {"step0": v}}, window=4),
    "xdit window": lambda v: Plan.from_xdit({"block0": {"step0": "FULL_ATTN"}}, window=v),
    "plan": lambda v: parse_options({"plan": v}),
    "compiler": lambda v: parse_options({"compiler": v}),
    "strict": lambda v: parse_options({"strict": v}),
    "kernel": lambda v: parse_options({"window_kernel": v}),
    "inductor": lambda v: parse_options({"inductor": v}),
    "mode": lambda v: parse_options({"mode": v}),
    "options": lambda v: parse_options({v if getattr(v, "__hash__", None) else "x": 1}),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("call", CALLS)
def test_odd_values_elsewhere_are_typed_errors(call: str, name: str) -> None:
    typed_or_right(lambda: CALLS[call](ODD[name]))


def test_a_bomb_of_lists_is_told_at_once() -> None:
    with pytest.raises(PlanError, match="too large"):
        Plan.full(["a"], steps=2, provenance={"bomb": BOMB})
