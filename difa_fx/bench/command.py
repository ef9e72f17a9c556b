"""``difa bench``: the command line of :func:`difa_fx.bench.run`."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difa_fx.errors import OptionError
from difa_fx.plan import Method, Plan
from difa_fx.targets import check_folder_of, count

if TYPE_CHECKING:
    from difa_fx.bench.records import Bench
    from difa_fx.bench.settings import Settings, Size

_DESCRIPTION = """\
Times methods and plans against plain Inductor, in one run of rounds in which everyone takes a turn. The denoisers are
built in, at their published sizes and with random weights; --layers, --batch and --tokens change them.
Writes OUTPUT.json, OUTPUT.md and figures. Several values of --tokens, --batch or --window give a case each.
"""


def add_parser(commands: Any) -> None:
    """Add ``bench`` to the command line."""
    parser = commands.add_parser(
        "bench",
        help="time methods and plans against Inductor, on built-in denoisers",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "shapes",
        nargs="+",
        metavar="SHAPE",
        help="dit-xl-2-512, pixart-sigma-1024, pixart-sigma-2k, sd3-medium-1024, flux-dev-1024, wan-1.3b-480p",
    )
    parser.add_argument("-o", "--output", required=True, type=Path, help="path of the results, without a suffix")
    _add_sizes(parser)
    _add_contenders(parser)
    parser.add_argument("--rounds", type=count, help="turns of every contender (default 5 on CPU, 20 on CUDA)")
    parser.add_argument("--warmup", type=int, default=1, help="turns before them that do not count (default 1)")
    parser.add_argument(
        "--processes", type=int, default=1, help="pairs of processes that measure compilation and memory (default 1)"
    )
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument("--mode", help="torch's own, of Inductor and difa alike, for instance reduce-overhead")
    parser.add_argument("--no-figures", action="store_true", help="write JSON and tables alone")
    parser.set_defaults(run=run)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=count, help="transformer layers (default as published)")
    parser.add_argument("--batch", type=count, nargs="+", default=[None], help="both halves of guidance together")
    parser.add_argument("--tokens", type=count, nargs="+", default=[None], help="image tokens (default as published)")
    parser.add_argument(
        "--window",
        nargs="+",
        default=[None],
        help="tokens to either side, or n/8, the default of methods; a plan keeps its own where this is not given",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="very narrow denoisers with few tokens, to try the command")
    parser.add_argument("--seed", type=int, default=0)


def _add_contenders(parser: argparse.ArgumentParser) -> None:
    methods = [method.value for method in Method]
    parser.add_argument("--methods", nargs="*", default=methods, help=f"of {', '.join(methods)} (default all)")
    parser.add_argument("--plan", help="a plan's JSON file; it is measured over whole generations")
    parser.add_argument("--columns", help="the plan's columns for a denoiser with fewer sites, for instance 4,12,20,27")
    parser.add_argument("--steps", type=count, help="steps of a generation (default as in the plan)")
    parser.add_argument(
        "--peers",
        nargs="*",
        default=[],
        help="hooked, fbcache, pab or fastercache, each also with +compile; or all. They need --plan",
    )
    parser.add_argument(
        "--first-block-threshold", type=float, default=0.05, help="of FirstBlockCache (default %(default)s)"
    )
    parser.add_argument("--no-eager", action="store_true", help="leave the uncompiled denoiser out")
    parser.add_argument("--max-autotune", action="store_true", help="Inductor with mode=max-autotune, too")


def run(arguments: argparse.Namespace) -> str:
    """Measure as ``arguments`` say and write the results; what to print."""
    from difa_fx.bench.measure import run as measure
    from difa_fx.bench.plots import draw
    from difa_fx.bench.report import markdown

    output: Path = arguments.output
    check_folder_of(output, "the results'", "a path")
    bench = measure(
        sizes_of(arguments),
        settings_of(arguments),
        windows=arguments.window,
        finished=lambda so_far: _write(so_far, output),
    )
    if not arguments.no_figures:
        draw(bench, output)
    return markdown(bench)


def sizes_of(arguments: argparse.Namespace) -> list[Size]:
    """Every shape at every number of tokens and batch."""
    from difa_fx.bench.settings import Size

    return [
        Size(
            shape=shape,
            layers=arguments.layers,
            batch=batch,
            tokens=tokens,
            dtype=arguments.dtype,
            device=arguments.device,
            tiny=arguments.tiny,
            seed=arguments.seed,
        )
        for shape, tokens, batch in itertools.product(arguments.shapes, arguments.tokens, arguments.batch)
    ]


def settings_of(arguments: argparse.Namespace) -> Settings:
    """What is measured at each."""
    from difa_fx.bench.settings import PEERS, Settings

    return Settings(
        methods=tuple(arguments.methods),
        plan=None if arguments.plan is None else Plan.load(arguments.plan),
        columns=_columns(arguments.columns),
        steps=arguments.steps,
        peers=PEERS if arguments.peers == ["all"] else tuple(arguments.peers),
        first_block_threshold=arguments.first_block_threshold,
        rounds=arguments.rounds,
        warmup=arguments.warmup,
        eager=not arguments.no_eager,
        max_autotune=arguments.max_autotune,
        processes=arguments.processes,
        compiler=arguments.compiler,
        mode=arguments.mode,
        progress=True,
    )


def _columns(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise OptionError(
            "the columns are no numbers", where="--columns", got=text, allowed="0,1,2,...", todo="part them by commas"
        )
    return tuple(map(int, parts))


def _write(bench: Bench, output: Path) -> None:
    from difa_fx.bench.report import markdown
    from difa_fx.plan_io import write_text

    write_text(output.with_name(f"{output.name}.json"), json.dumps(bench.to_dict(), indent=1, allow_nan=False) + "\n")
    write_text(output.with_name(f"{output.name}.md"), markdown(bench))
