"""DiTFastAttn on PixArt-Sigma at 1 024 or 2 048 pixels: search a plan, time it, judge what it draws.

    python examples/run_pixart.py --n_calib 6 --n_steps 50 --threshold 0.0725 --eval_n_images 5000
    python examples/run_pixart.py --model PixArt-alpha/PixArt-Sigma-XL-2-2K-MS --n_calib 4 --threshold 0.1
    python examples/run_pixart.py --random-weights --tiny

Needs the weights of the model and of PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers (autoencoder and T5), MS-COCO's
captions, and for FID a folder of real images (`difa prepare coco`). CLIP scores need CLIP's weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import random_weights
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
from experiment import main
from experiment_options import Defaults, parser_for
from prompts import coco_captions, read_prompts
from subjects import Subject, pipeline_subject, placed, pretrained

DEFAULTS = Defaults(
    model="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    n_calib=6,
    n_steps=50,
    threshold=0.0725,
    cfg_scale=4.5,
    eval_n_images=5000,
    eval_batchsize=1,
    time_batch=1,
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = parser_for(str(__doc__), DEFAULTS)
    made.add_argument("--negative_prompt", default="")
    made.add_argument("--coco_path", type=Path, help="folder with annotations/captions_val2014.json in it")
    made.add_argument("--prompts", type=Path, help="file with a prompt a line, in place of MS-COCO's captions")
    made.add_argument("--eval_real_image_path", help="folder of real images, for FID")
    made.add_argument("--clip", help="folder or hub name of the CLIP model (default openai/clip-vit-base-patch16)")
    made.add_argument(
        "--pipeline",
        default="PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
        help="folder or hub name of what is around the denoiser (default %(default)s)",
    )
    return made


def subject(options: argparse.Namespace) -> Subject:
    """The pipeline, and the captions that the search and the judgement use."""
    pipe, name, call = _pipeline(options)
    if options.coco_path is not None or not (options.random_weights or options.prompts):
        captions = coco_captions(options.coco_path or Path("data/mscoco"))
    else:
        captions = read_prompts(options.prompts)
    # The captions that DiTFastAttn's script draws from the same seed.
    picked = np.random.RandomState(options.seed).choice(len(captions), options.n_calib)
    config = pipe.transformer.config
    return pipeline_subject(
        pipe,
        options,
        call=call | ({"negative_prompt": options.negative_prompt} if options.negative_prompt else {}),
        name=name,
        order="uncond_first",
        tokens=(config.sample_size // config.patch_size) ** 2,
        calibration=[captions[i] for i in picked],
        evaluation=[captions[i % len(captions)] for i in range(options.eval_n_images)],
    )


def _pipeline(options: argparse.Namespace) -> tuple[Any, str, dict[str, Any]]:
    """The pipeline, its name, and how it is called."""
    if options.random_weights:
        size = 256 if "2K" in options.model else 128
        pipe = random_weights.pixart_sigma(tiny=options.tiny, sample_size=size)
        call: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False}
        name = "PixArt-Sigma_random_tiny" if options.tiny else f"PixArt-Sigma-{8 * size}_random"
        return pipe, name, call | ({"max_sequence_length": 32} if options.tiny else {})
    _, dtype = placed(options)
    load = PixArtTransformer2DModel.from_pretrained
    denoiser = pretrained(load, options.model, subfolder="transformer", dtype=dtype)
    pipe = pretrained(PixArtSigmaPipeline.from_pretrained, options.pipeline, transformer=denoiser, dtype=dtype)
    return pipe, options.model, {}


def run(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; the exit code."""
    return main("run_pixart", parser(), argv, subject)


if __name__ == "__main__":
    sys.exit(run())
