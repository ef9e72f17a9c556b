"""The flags of the ``run_*.py`` scripts: those of DiTFastAttn's scripts, with their meaning, and a few more."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from difa_fx.errors import OptionError
from difa_fx.plan import Plan

METHODS: Final = {
    "output_share": "cached",
    "residual_window_attn+cfg_attn_share": "window+cfg",
    "residual_window_attn": "window",
    "full_attn+cfg_attn_share": "full+cfg",
}
"""DiTFastAttn's names of the methods, in the order in which it tries them."""

METRICS: Final = {"": "reference", "paper": "paper", "reference": "reference", "rse": "rse", "ssim": "ssim"}
"""``--metric`` to the loss of a search."""

_TINY: Final = {"n_calib": 2, "n_steps": 6, "eval_n_images": 4, "eval_batchsize": 2, "time_batch": 2, "time_pairs": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a script does when a flag is not given; see the flags."""

    model: str
    n_calib: int
    n_steps: int
    threshold: float
    cfg_scale: float
    eval_n_images: int
    eval_batchsize: int
    time_batch: int


def parser_for(about: str, defaults: Defaults) -> argparse.ArgumentParser:
    """The parser of a script, to which it may add flags of its own.

    Args:
        about: what the script does.
        defaults: its defaults.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(goal=defaults.threshold)
    _their_flags(parser.add_argument_group("flags of DiTFastAttn's scripts"), defaults)
    _goals(parser.add_argument_group("what is wanted, one of these"), defaults)
    _own_flags(parser.add_argument_group("flags of these scripts alone"), defaults)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; ``goal`` is what calibration is asked for.

    ``--tiny`` makes the defaults small, and a plan's steps are the default number of steps.

    Raises:
        PlanError: the plan is none.
        OptionError: the plan has another number of steps than were asked for.
    """
    first = parser.parse_args(argv)
    if first.tiny:
        parser.set_defaults(**_TINY)
    if first.plan is not None:
        parser.set_defaults(n_steps=Plan.load(first.plan).steps)
    options = parser.parse_args(argv)
    if options.plan is not None:
        _check_steps(Plan.load(options.plan), options.n_steps)
    if options.tiny and not options.random_weights:
        parser.error("--tiny needs --random-weights: there are no published weights of that size")
    given = {name: getattr(options, name) for name in ("threshold", "target_speedup", "target_flops")}
    goal = {name: value for name, value in given.items() if value is not None}
    options.goal = goal or {"threshold": options.goal}
    return options


def _check_steps(plan: Plan, steps: int) -> None:
    if plan.steps != steps:
        raise OptionError(
            "the plan has another number of steps",
            where="--n_steps",
            got=steps,
            allowed=plan.steps,
            todo=f"leave --n_steps out, or save plan.for_steps({steps}) and give that",
        )


def _their_flags(group: argparse._ArgumentGroup, defaults: Defaults) -> None:
    add = group.add_argument
    add("--model", default=defaults.model, help="folder or hub name (default %(default)s)")
    add("--n_calib", type=_count, default=defaults.n_calib, help="samples of the search (default %(default)s)")
    add("--n_steps", type=_count, default=defaults.n_steps, help="denoising steps (default %(default)s)")
    add(
        "--window_size",
        type=_count,
        help="tokens to either side of a query (default: an eighth of the tokens, as in the paper: 128 of 1 024)",
    )
    add("--eval_n_images", type=_count, default=defaults.eval_n_images, help="samples to judge by (%(default)s)")
    add("--eval_batchsize", type=_count, default=defaults.eval_batchsize, help="samples at once (%(default)s)")
    add("--use_cache", action="store_true", help="go on with, or take, what an earlier search with these flags found")
    add("--raw_eval", action="store_true", help="no plan: judge the uncompressed denoiser")
    add(
        "--ablation",
        type=_candidates,
        default=list(METHODS.values()),
        metavar="METHODS",
        help=f"methods to try, in order, with commas between: {', '.join(METHODS)}, or their names in difa_fx",
    )
    add("--seed", type=int, default=3, help="of noise, and of what the search is run on (default %(default)s)")
    add(
        "--metric",
        type=_metric,
        default="reference",
        help="loss that the search compares with the threshold: paper, reference, rse or ssim. The default, "
        "reference (or ''), is what DiTFastAttn's scripts compute, so that thresholds of their command lines mean "
        "the same here; the formula printed in the paper, paper, gives smaller losses",
    )
    add("--cfg_scale", type=float, default=defaults.cfg_scale, help="guidance scale (default %(default)s)")
    add("--debug", action="store_true", help="search and time, but judge nothing")


def _goals(group: argparse._ArgumentGroup, defaults: Defaults) -> None:
    goals = group.add_mutually_exclusive_group()
    goals.add_argument(
        "--threshold",
        type=float,
        help=f"delta of the paper's search (default {defaults.threshold}; that of DiTFastAttn's scripts, 1, lets "
        "nearly everything pass)",
    )
    goals.add_argument("--target_speedup", "--target-speedup", type=float, help="times faster than full attention")
    goals.add_argument("--target_flops", "--target-flops", type=float, help="share of the attention's operations")
    goals.add_argument("--plan", type=Path, help="no search: this plan")


def _own_flags(group: argparse._ArgumentGroup, defaults: Defaults) -> None:
    add = group.add_argument
    add("--output", type=Path, default=Path("output"), help="folder of plans, pictures and results.jsonl (%(default)s)")
    add("--compiler", default="inductor", choices=("inductor", "aot_eager", "eager"), help="the last two to debug")
    add("--device", help="default: CUDA where there is one")
    add("--time_batch", "--time-batch", type=_count, default=defaults.time_batch, help="samples timed at once")
    add("--time_pairs", "--time-pairs", type=int, default=3, help="timed generations of each kind (%(default)s)")
    add("--random-weights", action="store_true", help="no download: the published size, with random weights")
    add("--tiny", action="store_true", help="with --random-weights: a tiny denoiser, few steps and samples")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def _candidates(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")] if text else list(METHODS)
    known = METHODS | {own: own for own in METHODS.values()}
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is no method; there are {', '.join(known)}")
    return [known[name] for name in names]


def _metric(text: str) -> str:
    if text not in METRICS:
        raise argparse.ArgumentTypeError(f"{text!r} is no loss; there are {', '.join(filter(None, METRICS))}")
    return METRICS[text]
