"""The command ``difa``: look at a denoiser, find a plan for it, look at a plan, bring a plan from xDiT."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from difa_fx import __version__, calibrate_command
from difa_fx.bench import command as bench_command
from difa_fx.errors import DifaError, printable, short
from difa_fx.evaluation import command as evaluation_command
from difa_fx.plan import Method, Plan
from difa_fx.targets import count, is_function, made_by, on_examples

if TYPE_CHECKING:
    from difa_fx.inspection import GraphReport

_TRACEBACK: Final = "DIFA_TRACEBACK"

_LETTERS = {
    Method.FULL: "F",
    Method.WINDOW: "W",
    Method.CACHED: ".",
    Method.FULL_CFG: "f",
    Method.WINDOW_CFG: "w",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 after an error that was printed; 130 where the user interrupted it; 141 where nobody reads what it prints.
    """
    arguments = _parser().parse_args(argv)
    try:
        text = arguments.run(arguments)
        if text:
            print(printable(text), flush=True)
    except DifaError as error:
        return _failed(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        _failed(f"interrupted; {getattr(arguments, 'resumes', 'nothing is left behind')}")
        return 130
    except BrokenPipeError:
        _close_pipe()
        return 141
    except Exception as error:
        if os.environ.get(_TRACEBACK):
            raise
        return _failed(f"{type(error).__name__}: {error}\n  to do: {_TRACEBACK}=1 difa ... shows where it happened")
    return 0


def _failed(text: str) -> int:
    with contextlib.suppress(OSError):
        print(printable(f"difa: {text}"), file=sys.stderr, flush=True)
    return 1


def _close_pipe() -> None:
    """Let Python not try again, at its end, to write to a pipe that nobody reads."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """argparse, with messages that a terminal can show."""

    def error(self, message: str) -> NoReturn:
        super().error(short(printable(message), 500))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="difa", description=__doc__)
    parser.add_argument("--version", action="version", version=f"difa_fx {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="every attention of a denoiser, and what it can become")
    inspect.add_argument(
        "target",
        help="a folder or hub name of a diffusers denoiser, or module:function that returns (model, args, kwargs)",
    )
    inspect.add_argument("--subfolder", help="where in a pipeline's folder the denoiser lies")
    inspect.add_argument("--random-weights", action="store_true", help="read the config alone")
    inspect.add_argument("--batch", type=count, default=2, help="both CFG halves together (default 2)")
    inspect.set_defaults(run=_inspect)

    show = commands.add_parser("show", help="a plan as a grid of steps and sites")
    show.add_argument("plan", help="a plan's JSON file")
    show.add_argument("-o", "--output", help="draw it to this file: .png, .svg or .pdf")
    show.set_defaults(run=_show)

    calibrate_command.add_parser(commands)
    bench_command.add_parser(commands)
    evaluation_command.add_parser(commands)

    xdit = commands.add_parser("import-xdit", help="make a plan from xDiT's JSON")
    xdit.add_argument("source", help="xDiT's file")
    xdit.add_argument("-o", "--output", required=True, help="where the plan goes")
    xdit.add_argument("--window", type=int, required=True, help="tokens to either side")
    xdit.add_argument("--cfg", choices=("cond_first", "uncond_first"), help="order of the CFG halves")
    xdit.add_argument("--site", default="transformer_blocks.{block}.attn1", help="path of a block's site")
    xdit.set_defaults(run=_import_xdit)
    return parser


def _inspect(arguments: argparse.Namespace) -> str:
    from difa_fx.inspection import inspect

    model, args, kwargs = _load(arguments)
    with on_examples(type(model).__name__):
        graphs = inspect(model, *args, **kwargs)
    return "\n\n".join(format_report(graph) for graph in graphs)


def _load(arguments: argparse.Namespace) -> tuple[Any, Sequence[Any], dict[str, Any]]:
    if is_function(arguments.target):
        model, args, kwargs = made_by(arguments.target, (3,), "(model, args, kwargs)")
        return model, args, kwargs
    from difa_fx.loading import example_inputs, load_denoiser

    model = load_denoiser(arguments.target, subfolder=arguments.subfolder, random_weights=arguments.random_weights)
    return model, (), example_inputs(model, batch=arguments.batch)


def format_report(graph: GraphReport) -> str:
    """A graph's report as text: a table of sites, then what is left alone and why."""
    rows = [("site", "kind", "B", "H", "N", "D", "FLOPs", "can become")]
    for site in graph.sites:
        sizes = (str(site.batch), str(site.heads), str(site.tokens), str(site.head_dim))
        share = f"{site.flops_share:.1%}"
        rows.append((site.path, site.kind, *sizes, share, ", ".join(site.methods)))
    lines = _table(rows) if graph.sites else ["no attention that a plan could change"]
    reasons = dict.fromkeys((why, site.path) for site in graph.sites for _, why in site.refused)
    lines += [f"  {path} cannot do more: {why}" for why, path in reasons]
    if graph.rejected:
        lines += ["", "left alone:"]
        lines += [f"  {path}: {reason}" for path, reason in graph.rejected]
    summary = (
        f"{len(graph.sites)} sites; {graph.segments} segments, {graph.unique_blocks} unique in the repeated part; "
        f"{graph.flops / 1e9:.2f} GFLOP a call; latents: {graph.latents}; timestep: {graph.timestep}"
    )
    return "\n".join([*lines, "", summary])


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _show(arguments: argparse.Namespace) -> str:
    from difa_fx.findings import calibration_of, summary
    from difa_fx.report import plot_plan

    plan = Plan.load(arguments.plan)
    if arguments.output:
        return f"{plot_plan(plan, arguments.output)}: {plan}"
    return format_plan(plan) + (f"\n\n{summary(plan)}" if calibration_of(plan) else "")


def format_plan(plan: Plan) -> str:
    """A plan as text: a column a site, a row a step."""
    legend = ", ".join(f"{letter} {method.value}" for method, letter in _LETTERS.items())
    width = len(str(plan.steps - 1))
    rows = [
        f"step {step:>{width}}  {''.join(_LETTERS[method] for method in row)}" for step, row in enumerate(plan.methods)
    ]
    return "\n".join([str(plan), legend, "", *rows])


def _import_xdit(arguments: argparse.Namespace) -> str:
    plan = Plan.from_xdit(arguments.source, window=arguments.window, site=arguments.site, cfg=arguments.cfg)
    plan.save(arguments.output)
    return f"{arguments.output}: {plan}"
