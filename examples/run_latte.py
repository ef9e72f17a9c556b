"""DiTFastAttn on Latte, text to video: search a plan, time it, compare every frame with the uncompressed video.

    python examples/run_latte.py --n_calib 4 --n_steps 50 --threshold 0.05 --prompts prompts.txt
    python examples/run_latte.py --random-weights --tiny

Needs the weights of maxin-cn/Latte-1. Both videos of each prompt are written, as .mp4 where imageio and imageio-ffmpeg
are installed and else as .gif.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import random_weights
from diffusers import LattePipeline
from experiment import main
from experiment_options import Defaults, parser_for
from prompts import read_prompts
from subjects import Subject, pipeline_subject, placed, pretrained

DEFAULTS = Defaults(
    model="maxin-cn/Latte-1",
    n_calib=4,
    n_steps=50,
    threshold=0.05,
    cfg_scale=7.5,
    eval_n_images=8,
    # Of one prompt alone the pipeline cuts the padding off, and its denoiser is compiled anew for every length.
    eval_batchsize=2,
    time_batch=2,
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = parser_for(str(__doc__), DEFAULTS)
    made.add_argument("--prompts", type=Path, help="file with a prompt a line (default: a few of our own)")
    return made


def subject(options: argparse.Namespace) -> Subject:
    """The pipeline and its prompts."""
    call: dict[str, Any] = {}
    if options.random_weights:
        name = f"Latte-1_random{'_tiny' if options.tiny else ''}"
        pipe = random_weights.latte(tiny=options.tiny)
        call["clean_caption"] = False
    else:
        name, (_, dtype) = options.model, placed(options)
        pipe = pretrained(LattePipeline.from_pretrained, options.model, dtype=dtype)
    config = pipe.transformer.config
    pixels = 8 * config.sample_size
    prompts = read_prompts(options.prompts)
    return pipeline_subject(
        pipe,
        options,
        call=call | {"video_length": config.video_length, "height": pixels, "width": pixels},
        name=name,
        order="uncond_first",
        tokens=(config.sample_size // config.patch_size) ** 2,
        calibration=[prompts[i % len(prompts)] for i in range(options.n_calib)],
        evaluation=[prompts[i % len(prompts)] for i in range(options.eval_n_images)],
        video=True,
    )


def run(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; the exit code."""
    return main("run_latte", parser(), argv, subject)


if __name__ == "__main__":
    sys.exit(run())
