"""DiTFastAttn on Open-Sora's STDiT, text to video: search a plan, time it, compare every frame.

    python examples/run_opensora.py --config configs/opensora-v1-1/inference/sample.py --threshold 0.05
    python examples/run_opensora.py --random-weights --tiny

Needs Open-Sora 1.0 or 1.1 (package `opensora`) and one of its configuration files for inference, which names the
weights. Spatial and temporal attention are both compressed; DiTFastAttn's script compresses the spatial one alone. Both
videos of each prompt are written, as .mp4 where imageio and imageio-ffmpeg are installed and else as .gif.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import open_sora
from experiment import main
from experiment_options import Defaults, parser_for
from prompts import read_prompts
from subjects import Subject, placed

DEFAULTS = Defaults(
    model="Open-Sora",
    n_calib=4,
    n_steps=100,
    threshold=0.05,
    cfg_scale=7.0,
    eval_n_images=8,
    eval_batchsize=1,
    time_batch=1,
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = parser_for(str(__doc__), DEFAULTS)
    made.add_argument(
        "--config",
        default="configs/opensora/inference/16x256x256.py",
        help="Open-Sora's configuration file (default %(default)s)",
    )
    made.add_argument("--prompts", type=Path, help="file with a prompt a line (default: a few of our own)")
    return made


def subject(options: argparse.Namespace) -> Subject:
    """STDiT with what runs it, and its prompts."""
    device, _ = placed(options)
    settings = {"steps": options.n_steps, "cfg_scale": options.cfg_scale, "device": device}
    if options.random_weights:
        name = f"{options.model}_random{'_tiny' if options.tiny else ''}"
        model = open_sora.random_weights(tiny=options.tiny, **settings)
    else:
        name = f"{options.model}_{Path(options.config).stem}"
        model = open_sora.load(options.config, **settings)
    prompts = read_prompts(options.prompts)
    return Subject(
        name=name,
        denoiser=model.denoiser,
        draw=model.draw,
        order="cond_first",
        tokens=model.tokens,
        calibration=[prompts[i % len(prompts)] for i in range(options.n_calib)],
        evaluation=[prompts[i % len(prompts)] for i in range(options.eval_n_images)],
        target=model.denoiser,
        arguments={"sampler": model.sample},
        video=True,
    )


def run(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; the exit code."""
    return main("run_opensora", parser(), argv, subject)


if __name__ == "__main__":
    sys.exit(run())
