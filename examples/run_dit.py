"""DiTFastAttn on DiT-XL/2 at 512 pixels: search a plan, time it against plain compilation, judge what it draws.

    python examples/run_dit.py --n_calib 8 --n_steps 50 --threshold 0.05 --eval_n_images 5000
    python examples/run_dit.py --random-weights --tiny

Needs the weights of facebook/DiT-XL-2-512, and for FID a folder of real images (`difa prepare imagenet`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import random_weights
import torch
from diffusers import DiTPipeline
from experiment import main
from experiment_options import Defaults, parser_for
from subjects import Subject, pipeline_subject, placed, pretrained

DEFAULTS = Defaults(
    model="facebook/DiT-XL-2-512",
    n_calib=8,
    n_steps=50,
    threshold=0.05,
    cfg_scale=4.0,
    eval_n_images=5000,
    eval_batchsize=12,
    time_batch=8,
)
CLASSES = 1000


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = parser_for(str(__doc__), DEFAULTS)
    made.add_argument("--eval_real_image_path", help="folder of real images, for FID")
    return made


def subject(options: argparse.Namespace) -> Subject:
    """The pipeline, and the class labels that the search and the judgement use."""
    if options.random_weights:
        name = f"DiT-XL-2-512_random{'_tiny' if options.tiny else ''}"
        pipe = random_weights.dit(tiny=options.tiny)
    else:
        name, (_, dtype) = options.model, placed(options)
        pipe = pretrained(DiTPipeline.from_pretrained, options.model, dtype=dtype)
    config = pipe.transformer.config
    # These are the labels that DiTFastAttn's script draws from the same seed, each by the generator that it uses.
    generator = torch.Generator().manual_seed(options.seed)
    legacy = np.random.RandomState(options.seed)
    return pipeline_subject(
        pipe,
        options,
        call={},
        latents="pt",
        name=name,
        order="cond_first",
        tokens=(config.sample_size // config.patch_size) ** 2,
        calibration=torch.randint(0, CLASSES, (options.n_calib,), generator=generator).tolist(),
        evaluation=legacy.randint(0, CLASSES, options.eval_n_images).tolist(),
    )


def run(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; the exit code."""
    return main("run_dit", parser(), argv, subject)


if __name__ == "__main__":
    sys.exit(run())
