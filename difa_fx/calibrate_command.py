"""``difa calibrate``: the command line of :func:`difa_fx.calibrate`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from difa_fx.errors import CalibrationError, OptionError
from difa_fx.plan import DEFAULT_WINDOW, CFGOrder, Plan
from difa_fx.targets import check_folder_of, count, is_function, made_by


def add_parser(commands: Any) -> None:
    """Add ``calibrate`` to the command line."""
    parser = commands.add_parser(
        "calibrate",
        help="find a plan for a pipeline, by the paper's search or for a budget",
        description="Under `torchrun --nproc-per-node=N -m difa_fx calibrate ...` the processes share the samples.",
    )
    parser.add_argument(
        "target",
        help="a folder or hub name of a diffusers pipeline, or module:function that returns (pipeline, samples) or "
        "(denoiser, samples, sampler)",
    )
    parser.add_argument("-o", "--output", required=True, type=Path, help="where the plan goes")
    parser.add_argument("--samples", nargs="+", help="prompts, or class labels")
    parser.add_argument("--samples-file", type=Path, help="a text file with one prompt or class label a line")
    parser.add_argument("--steps", type=count, required=True, help="steps of a generation")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--threshold", type=float, help="the paper's delta, 0.025 to 0.15 there")
    goal.add_argument("--target-speedup", type=float, help="times the speed of full attention")
    goal.add_argument("--target-flops", type=float, help="fraction of the attention's operations to keep")
    parser.add_argument(
        "--window", type=int, default=DEFAULT_WINDOW, help="tokens to either side (default %(default)s)"
    )
    parser.add_argument("--candidates", nargs="+", help="methods to try, in order")
    parser.add_argument("--loss", default="paper", help="paper, reference, rse or ssim (default %(default)s)")
    parser.add_argument("--cfg", default="auto", choices=("auto", *get_args(CFGOrder), "none"))
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--negative-prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", help="float32, float16 or bfloat16; auto takes the weights' own")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--verify", type=int, default=2, help="pairs of generations that measure the plan")
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever an earlier run left")
    parser.add_argument("--cache-dir", type=Path, help="where findings are kept until the plan is done")
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.set_defaults(run=run, resumes="the same command goes on where it was; --fresh begins anew")


def run(arguments: argparse.Namespace) -> str:
    """Calibrate as ``arguments`` say and write the plan; what to print."""
    from difa_fx.calibration import calibrate
    from difa_fx.findings import summary
    from difa_fx.workers import launched_by_torchrun

    check_folder_of(arguments.output, "the plan's", "a file")
    with launched_by_torchrun() as leads:
        target, samples, sampler = _load(arguments)
        optional = {} if arguments.candidates is None else {"candidates": arguments.candidates}
        plan: Plan = calibrate(
            target,
            samples,
            num_inference_steps=arguments.steps,
            threshold=arguments.threshold,
            target_speedup=arguments.target_speedup,
            target_flops=arguments.target_flops,
            window=arguments.window,
            loss=arguments.loss,
            cfg=None if arguments.cfg == "none" else arguments.cfg,
            seed=arguments.seed,
            sampler=sampler,
            guidance_scale=arguments.guidance_scale,
            negative_prompt=arguments.negative_prompt,
            verify=arguments.verify,
            resume=not arguments.fresh,
            cache_dir=arguments.cache_dir,
            compiler=arguments.compiler,
            **optional,
        )
        if not leads:
            return ""
        plan.save(arguments.output)
    return f"{arguments.output}: {plan}\n{summary(plan)}"


def _load(arguments: argparse.Namespace) -> tuple[Any, Sequence[Any], Callable[..., Any] | None]:
    """The pipeline or denoiser, its samples, and a denoiser's sampler."""
    given = _samples(arguments)
    if is_function(arguments.target):
        returns = "(pipeline, samples) or (denoiser, samples, sampler)"
        target, samples, *sampler = made_by(arguments.target, (2, 3), returns)
        return target, given or samples, sampler[0] if sampler else None
    if not given:
        raise CalibrationError(
            "there are no samples",
            where="--samples",
            allowed="--samples or --samples-file",
            todo="give some prompts, or class labels",
        )
    from difa_fx.loading import load_pipeline

    return load_pipeline(arguments.target, dtype=arguments.dtype, device=arguments.device), given, None


def _samples(arguments: argparse.Namespace) -> list[Any]:
    lines: list[str] = list(arguments.samples or ())
    if arguments.samples_file is not None:
        try:
            text = arguments.samples_file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise OptionError(
                "the samples cannot be read",
                where=str(arguments.samples_file),
                got=str(error),
                allowed="UTF-8 text, a prompt or class label a line",
                todo="mend the path, or save the file as UTF-8",
            ) from error
        lines += [line for line in text.splitlines() if line.strip()]
    return [int(line) for line in lines] if lines and all(_is_label(line) for line in lines) else lines


def _is_label(line: str) -> bool:
    return line.strip().isdecimal() and len(line) < 20
