"""Everything there is to measure on a CUDA device, with one command.

    python benchmarks/cuda.py -o results --budget 1800

Stages run one after the other, each in a process of its own with its own time limit and log, the ones worth most
first.  What a stage has measured is written when it ends, and one that fails or is cut takes nothing from the others.
Stages that time nothing, the tests and those that only fill Inductor's cache for later ones, run side by side.
``--list`` says what they are.  ``--tiny --device cpu`` tries it all without a device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(tempfile.gettempdir()) / "difa-bench-cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A command.

    Attributes:
        name: of its files, too.
        what: it does, for people.
        needs: seconds that must be left for it to begin: about what it takes.
        limit: seconds after which it is cut.
        command: its arguments.
        environment: its own variables.
        alone: whether it times something, so that nothing may run beside it.
        instead_of: a stage that must have failed for this one to run.
    """

    name: str
    what: str
    needs: float
    limit: float
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    alone: bool = True
    instead_of: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a stage: ``ran``, ``failed``, ``cut``, ``no time left`` or ``not needed``."""

    name: str
    state: str
    seconds: float = 0.0
    said: str = ""


def stages(options: argparse.Namespace) -> list[Stage]:
    """All stages, those worth most first."""
    shown = _Commands(options)
    graphs, once = ("--mode", "reduce-overhead"), ("--rounds", "1")
    kernels, plan, pixart = shown.kernels, shown.plan(*graphs), shown.pixart()
    methods, deep = shown.methods(*graphs), shown.deep(*graphs)
    beside = [
        ("tests", "tests of kernels and CUDA graphs", 40, 300, shown.tests),
        ("compile-kernels", "fill the cache for kernels", 60, 240, (*kernels, *once)),
        ("compile-dit-plan", "fill the cache for dit-plan", 60, 240, (*plan, *once)),
        ("compile-dit-methods", "fill the cache for dit-methods", 60, 240, (*methods, *once)),
        ("compile-dit-methods-1k", "fill the cache for dit-methods-1k", 60, 240, (*deep, *once)),
        ("compile-pixart-2k", "fill the cache for pixart-2k", 60, 240, (*pixart, *once)),
    ]
    alone = [
        ("kernels", "windows and refreshing steps against full attention", 25, 180, (*kernels, "--rounds", "9")),
        ("dit-plan", "a published plan on DiT-XL/2-512, CUDA graphs", 40, 240, (*plan, "--rounds", "10")),
        ("dit-methods-1k", "single methods at 1,024 tokens, CUDA graphs", 45, 240, deep),
        ("dit-methods", "single methods at longer lengths, 4 layers, CUDA graphs", 45, 300, methods),
        ("dit-methods-pieces", "the same without CUDA graphs", 45, 300, shown.methods()),
        ("pixart-2k", "a plan that keeps 24 % at 2K", 60, 300, (*pixart, "--rounds", "3")),
        ("memory", "compile seconds and memory, in processes of their own", 100, 400, shown.memory),
        ("pixart-2k-tuned", "the same on 4 layers, max-autotune for both", 150, 450, shown.tuned),
        ("dit-plan-pieces", "dit-plan without CUDA graphs, beside attention processors", 60, 240, shown.hooked),
        ("dit-peers", "the same on 4 layers, beside compiled processors, too", 120, 400, shown.peers),
    ]
    return [
        Stage(
            name=name,
            what=what,
            needs=0 if options.tiny else needs,
            limit=limit,
            command=(*command, *(() if name == "tests" else ("-o", str(options.output / name)))),
            environment=environment,
            alone=found is alone,
            instead_of="dit-methods" if name == "dit-methods-pieces" else None,
        )
        for found, environment in ((beside, {"TORCHINDUCTOR_COMPILE_THREADS": "3"}), (alone, {}))
        for name, what, needs, limit, command in found
    ]


class _Commands:
    """The commands of the stages."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._tiny, self._layers = options.tiny, options.layers
        self._size = ("--device", options.device, "--dtype", "bfloat16")

    def _bench(self, shape: str, *arguments: str, tiny: Sequence[str] = ()) -> tuple[str, ...]:
        usual = ("--no-eager", "--no-figures", *(("--processes", "0") if "--processes" not in arguments else ()))
        small = ("--tiny", "--compiler", "eager", *tiny) if self._tiny else ()
        return (sys.executable, "-m", "difa_fx", "bench", shape, *self._size, *usual, *arguments, *small)

    @property
    def tests(self) -> tuple[str, ...]:
        files = sorted(str(path) for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text())
        run = ("--collect-only", "-q") if self._tiny else ("-n", "6", "--dist", "worksteal", "-v", "--tb=short")
        # What torch warns of on some device or other is shown, and fails nothing.
        shown = ["-W", "default", "-p", "no:cacheprovider", "-p", "no:benchmark"]
        return (sys.executable, "-m", "pytest", "-m", "gpu", *shown, *run, *files)

    @property
    def kernels(self) -> tuple[str, ...]:
        widths, tokens = (["8"], ["64"]) if self._tiny else (["72", "64"], ["1024", "4096", "16384"])
        heads = ("--heads", "2" if self._tiny else "16", "--batch", "2")
        script = str(ROOT / "benchmarks" / "kernels.py")
        return (sys.executable, script, *self._size, *heads, "--head-dims", *widths, "--tokens", *tokens)

    def plan(self, *arguments: str) -> tuple[str, ...]:
        plan = ("--plan", str(ROOT / "tests" / "plans" / "dit-xl-2-512_20steps_t0.15.json"))
        tiny = ("--columns", "4,27", "--steps", "4", "--window", "5")
        return self._bench("dit-xl-2-512", *plan, "--methods", *arguments, tiny=tiny)

    def methods(self, *arguments: str) -> tuple[str, ...]:
        tokens = ("16", "64") if self._tiny else ("4096", "16384")
        layers = "1" if self._tiny else "4"
        return self._bench("dit-xl-2-512", "--layers", layers, "--tokens", *tokens, *arguments, tiny=("--rounds", "1"))

    def deep(self, *arguments: str) -> tuple[str, ...]:
        # At 1,024 tokens the host takes longer to begin a step of 4 layers than the device to run it.
        layers = ("--layers", "1", "--tokens", "16") if self._tiny else ()
        return self._bench("dit-xl-2-512", *layers, *arguments, tiny=("--rounds", "1"))

    def pixart(self, *arguments: str, layers: int | None = None) -> tuple[str, ...]:
        plan = ("--plan", str(ROOT / "benchmarks" / "plans" / "pixart-sigma-2k_20steps_24.json"))
        count = 2 if self._tiny else layers or self._layers
        columns = ",".join(str(28 * number // count) for number in range(count))
        tiny = ("--steps", "6", "--window", "5")
        fitted = ("--layers", str(count), "--columns", columns, "--methods")
        return self._bench("pixart-sigma-2k", *plan, *fitted, *arguments, tiny=tiny)

    @property
    def tuned(self) -> tuple[str, ...]:
        return self.pixart("--mode", "max-autotune-no-cudagraphs", "--rounds", "3", layers=4)

    @property
    def hooked(self) -> tuple[str, ...]:
        return self.plan("--peers", "hooked", "--rounds", "5")

    @property
    def peers(self) -> tuple[str, ...]:
        small = ("--layers", "4", "--columns", "4,12,20,27", "--peers", "hooked", "hooked+compile", "--rounds", "5")
        return self.plan(*(("--peers", "hooked", "hooked+compile", "--rounds", "1") if self._tiny else small))

    @property
    def memory(self) -> tuple[str, ...]:
        # No rounds to speak of: what is wanted comes from the processes.
        return self.plan("--processes", "1", "--rounds", "1")


def main(argv: Sequence[str] | None = None) -> list[Outcome]:
    """Run the stages that were asked for; what became of each."""
    options = _options(argv)
    known = stages(options)
    if options.list:
        print("\n".join(f"{s.name}: {s.what} (about {s.needs:.0f} s, {s.limit:.0f} at most)" for s in known))
        return []
    chosen = [stage for stage in known if options.stages is None or stage.name in options.stages]
    options.output.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + options.budget
    outcomes: dict[str, Outcome] = {}
    for alone, neighbours in itertools.groupby(chosen, key=lambda stage: stage.alone):
        for together in [[stage] for stage in neighbours] if alone else [list(neighbours)]:
            _run(together, ends, outcomes, options.output)
            if not alone:
                _forget_timings()
            _write(outcomes, options)
    print(_table(outcomes.values()))
    return list(outcomes.values())


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of results and logs")
    parser.add_argument("--stages", nargs="+", help="some of them, in any order (default all)")
    parser.add_argument("--list", action="store_true", help="say what stages there are")
    parser.add_argument("--budget", type=float, default=3600, help="seconds for all stages (default %(default)s)")
    parser.add_argument("--layers", type=int, default=28, help="of pixart-2k (default %(default)s)")
    parser.add_argument("--archive", type=Path, help="a .tar.gz of the folder, written anew after each stage")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="very small denoisers, to try the command")
    options = parser.parse_args(argv)
    options.output = options.output.resolve()
    names = [stage.name for stage in stages(options)]
    unknown = [name for name in options.stages or () if name not in names]
    if unknown:
        parser.error(f"there is no stage {unknown[0]}; there are {', '.join(names)}")
    return options


def _run(together: Sequence[Stage], ends: float, outcomes: dict[str, Outcome], folder: Path) -> None:
    """Run stages side by side to their ends or limits."""
    running: dict[str, tuple[subprocess.Popen[bytes], float, float]] = {}
    for stage in together:
        now = time.monotonic()
        replaced = outcomes.get(stage.instead_of or "")
        if stage.instead_of is not None and (replaced is None or replaced.state != "failed"):
            outcomes[stage.name] = Outcome(name=stage.name, state="not needed")
        elif ends - now < stage.needs:
            outcomes[stage.name] = Outcome(name=stage.name, state="no time left", said=f"it needs {stage.needs:.0f} s")
        else:
            print(f"{stage.name}: {stage.what}", flush=True)
            running[stage.name] = _begin(stage, folder), now, min(now + stage.limit, ends)
    try:
        while running:
            for name, (process, began, until) in list(running.items()):
                late = time.monotonic() > until
                if process.poll() is None and not late:
                    continue
                del running[name]
                outcomes[name] = _ended(name, process, time.monotonic() - began, folder)
            time.sleep(0.1)
    finally:
        for process, _, _ in running.values():
            _end(process)


def _begin(stage: Stage, folder: Path) -> subprocess.Popen[bytes]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(CACHE),
        "TRITON_CACHE_DIR": str(CACHE / "triton"),
        **stage.environment,
    }
    with (folder / f"{stage.name}.log").open("wb") as log:
        return subprocess.Popen(
            stage.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,  # noqa: PLW1509  there are no threads; with all that it starts it is ended
        )


def _ended(name: str, process: subprocess.Popen[bytes], seconds: float, folder: Path) -> Outcome:
    code = process.poll()
    _end(process)
    state = "cut" if code is None else "failed" if code else "ran"
    lines = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "") if state != "ran" else ""
    print(f"{name}: {state} after {seconds:.0f} s {said[:300]}", flush=True)
    return Outcome(name=name, state=state, seconds=seconds, said=said[:300])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a stage and whatever it left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _forget_timings() -> None:
    """Forget which kernels were fastest while others ran beside them; what was compiled is kept."""
    for pattern in ("*.best_config", "difa-window-kernels.json"):
        for path in CACHE.rglob(pattern):
            path.unlink(missing_ok=True)


def _write(outcomes: dict[str, Outcome], options: argparse.Namespace) -> None:
    rows = [asdict(outcome) for outcome in outcomes.values()]
    (options.output / "stages.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (options.output / "stages.md").write_text(_table(outcomes.values()), encoding="utf-8")
    if options.archive is not None:
        fresh = options.archive.with_name(f"{options.archive.name}.part")
        with tarfile.open(fresh, "w:gz") as archive:
            archive.add(options.output, options.output.name)
        fresh.replace(options.archive)


def _table(outcomes: Iterable[Outcome]) -> str:
    lines = ["| stage | | seconds | |", "|---|---|---|---|"]
    for outcome in outcomes:
        said = outcome.said.replace("|", "/")
        lines.append(f"| {outcome.name} | {outcome.state} | {outcome.seconds:.0f} | {said} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
