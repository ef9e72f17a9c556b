"""Evaluation and generation from the command line: killed and started again, and shared by several processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from evaluation_target import folder_of
from processes import HERE, environment, launch, run
from thorough import cases

from difa_fx.cli import main

COUNT = 42

Folders = dict[str, Path]


def killed(arguments: list[str], *, when: Callable[[], bool]) -> None:
    """Start a slow run and kill it, and all that it started, as soon as ``when`` holds."""
    slow = environment(DIFA_TEST_SLEEP="0.3")
    process = subprocess.Popen(arguments, env=slow, cwd=HERE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and not when() and time.monotonic() < deadline:
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=60)
    assert process.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    place = tmp_path_factory.mktemp("folders")
    (place / "prompts.txt").write_text("".join(f"{i} cats\n" for i in range(COUNT)))
    return {
        "images": folder_of(place / "images", COUNT, shift=5),
        "real": folder_of(place / "real", 20, seed=3),
        "uncompressed": folder_of(place / "uncompressed", COUNT),
        "prompts": place / "prompts.txt",
    }


def arguments(folders: Folders, output: Path, checkpoint: Path | None = None) -> list[str]:
    own = {name: f"evaluation_target:{name}" for name in ("features", "clip", "perceptual")}
    given = own | {name: str(folders[name]) for name in ("real", "uncompressed", "prompts")}
    given |= {"batch-size": "4", "output": str(output)} | ({"checkpoint": str(checkpoint)} if checkpoint else {})
    return [
        "evaluate",
        str(folders["images"]),
        *(part for name, value in given.items() for part in (f"--{name}", value)),
    ]


def command(*words: str, processes: int = 1) -> list[str]:
    return [*(launch(processes) if processes > 1 else [sys.executable]), "-m", "difa_fx", *words]


@pytest.fixture(scope="module")
def whole(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What one undisturbed process finds."""
    output = tmp_path_factory.mktemp("whole") / "results.json"
    text = run(command(*arguments(folders, output)))
    found = json.loads(output.read_text())
    assert f"fid                  {found['fid']:.6g}" in text
    assert found["images"] == COUNT
    assert not found["skipped"]
    return found


@pytest.mark.slow
def test_sigkill_at_any_moment_changes_nothing(folders: Folders, whole: dict, tmp_path: Path) -> None:
    output, kept = tmp_path / "results.json", tmp_path / "kept"
    words = command(*arguments(folders, output, kept))

    def files() -> int:
        return len(list(kept.rglob("*.safetensors")))

    for count in (1, 30):
        killed(words, when=lambda count=count: files() >= count)
    assert not output.exists()
    # 11 batches of the images, looked at by features, clip, pixels, ssim and lpips, and 5 batches of the real ones
    assert 30 <= files() < 11 * 5 + 5
    run(words)
    assert json.loads(output.read_text()) == whole
    assert files() == 11 * 5 + 5


@pytest.mark.slow
@pytest.mark.parametrize("with_checkpoint", cases([True, False], core={True}))
def test_two_processes_find_what_one_does(with_checkpoint, folders: Folders, whole: dict, tmp_path: Path) -> None:
    output, kept = tmp_path / "results.json", tmp_path / "kept" if with_checkpoint else None
    text = run(command(*arguments(folders, output, kept), processes=2))
    # To the last bit: with the same threads a process, the same batches go through the same kernels.
    assert json.loads(output.read_text()) == whole
    assert text.count("fid  ") == 1  # one process speaks


@pytest.mark.slow
@pytest.mark.thorough
def test_two_processes_killed_and_gone_on_by_one(folders: Folders, whole: dict, tmp_path: Path) -> None:
    output, kept = tmp_path / "results.json", tmp_path / "kept"
    words = arguments(folders, output, kept)
    killed(command(*words, processes=2), when=lambda: len(list(kept.rglob("*.safetensors"))) >= 12)
    before = set(kept.rglob("*.safetensors"))
    run(command(*words))
    assert before <= set(kept.rglob("*.safetensors"))
    assert len(set(kept.rglob("*.safetensors"))) == 11 * 5 + 5
    assert json.loads(output.read_text()) == whole


GENERATE = """
import sys
from difa_fx.evaluation import generate_images
from difa_fx.workers import launched_by_torchrun
from evaluation_target import draw
with launched_by_torchrun():
    generate_images(draw, list(range(11)), sys.argv[1], batch_size=2, seed=5, progress=False)
"""


@pytest.mark.slow
@pytest.mark.thorough
def test_generation_by_two_processes_killed_and_gone_on_is_that_of_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(GENERATE)
    run([sys.executable, str(script), str(tmp_path / "one")])
    shared = [*launch(2), str(script), str(tmp_path / "two")]
    killed(shared, when=lambda: len(list((tmp_path / "two").glob("[0-9]*.png"))) >= 3)
    assert 3 <= len(list((tmp_path / "two").glob("[0-9]*.png"))) < 11
    run(shared)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if not path.name.startswith(".")}
        for name in ("one", "two")
    )
    assert one == two
    assert len(one) == 12


def test_the_command_line_says_what_was_left_out(folders: Folders, tmp_path: Path, capsys) -> None:
    output = tmp_path / "results.json"
    words = ["evaluate", str(folders["images"]), "--uncompressed", str(folders["uncompressed"])]
    assert main([*words, "--metrics", "psnr", "relative_l1", "-o", str(output)]) == 0
    text = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert text.splitlines() == [
        f"{folders['images']}: {COUNT} images",
        f"psnr         {found['psnr']:.6g}",
        f"relative_l1  {found['relative_l1']:.6g}",
    ]
    assert main([*words[:2], "--metrics", "psnr"]) == 1
    assert "uncompressed was not given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--features", "nothing_here:make"], "nothing_here"),
        (["--features", "evaluation_target"], "module:function"),
        (["--features", "evaluation_target:SIZE"], "module:function"),
        (["--prompts", "nothing.txt"], "prompts cannot be read"),
        (["-o", "no/such/folder/results.json"], "--output"),
    ],
)
def test_arguments_that_do_not_fit(words: list[str], message: str, folders: Folders, capsys) -> None:
    assert main(["evaluate", str(folders["images"]), *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "a cat\n\ntwo dogs\n"),
        ("a.json", '["a cat", "two dogs"]'),
        ("b.json", '{"samples": ["a cat", "two dogs"]}'),
    ],
)
def test_forms_of_prompts(name: str, content: str, tmp_path: Path) -> None:
    from difa_fx.evaluation.command import read_prompts

    (tmp_path / name).write_text(content)
    assert read_prompts(tmp_path / name) == ["a cat", "two dogs"]


def test_json_without_prompts(folders: Folders, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.json").write_text('{"samples": [1, 2]}')
    assert main(["evaluate", str(folders["images"]), "--prompts", str(tmp_path / "a.json")]) == 1
    assert "holds no prompts" in capsys.readouterr().err
