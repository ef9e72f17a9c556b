"""What an experiment is about: a denoiser, with what runs its generations.

Letters: B samples, T frames, C channels, H, W pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from difa_fx.errors import AttachError
from difa_fx.plan import CFGOrder


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """A denoiser, with what runs its generations.

    Attributes:
        name: of the model.
        denoiser: the module that is compiled.
        draw: ``(denoiser, samples, seeds)`` to images [B, C, H, W] or videos [B, T, C, H, W] from 0 to 1.
        order: which half of the batch is the conditional one.
        tokens: of one attention, by which the window is measured.
        calibration: samples of the search.
        evaluation: samples to judge by.
        target: what ``difa_fx.calibrate`` takes: a pipeline, or the denoiser itself.
        arguments: more of it: how a pipeline is called, or the sampler of a denoiser.
        video: whether it draws videos.
    """

    name: str
    denoiser: nn.Module
    draw: Callable[[nn.Module, Sequence[Any], Sequence[int]], Tensor]
    order: CFGOrder
    tokens: int
    calibration: Sequence[Any]
    evaluation: Sequence[Any]
    target: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    video: bool = False


def placed(options: argparse.Namespace) -> tuple[str, torch.dtype]:
    """Where the denoiser runs, and in which dtype: half precision on CUDA."""
    place = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return place, torch.float16 if place.startswith("cuda") else torch.float32


def pipeline_subject(
    pipe: Any,
    options: argparse.Namespace,
    *,
    call: Mapping[str, Any],
    latents: str = "latent",
    **about: Any,
) -> Subject:
    """A subject around a diffusers pipeline.

    Args:
        pipe: the pipeline.
        options: the script's.
        call: arguments of every call.
        latents: the pipeline's ``output_type`` that gives latents, which is enough for a search.
        **about: the other parts of the subject.
    """
    pipe.set_progress_bar_config(disable=True)
    place, dtype = placed(options)
    pipe.to(place)
    if pipe.transformer.dtype != dtype:
        pipe.to(dtype)
    call = {"guidance_scale": options.cfg_scale, **call}

    def draw(denoiser: nn.Module, samples: Sequence[Any], seeds: Sequence[int]) -> Tensor:
        pipe.transformer = denoiser
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        settings = {"num_inference_steps": options.n_steps, "output_type": "pt", **call}
        result = pipe(list(samples), generator=noise, **settings)
        drawn = result.frames if hasattr(result, "frames") else result.images
        return torch.as_tensor(drawn).float().cpu()

    return Subject(
        denoiser=pipe.transformer,
        draw=draw,
        target=pipe,
        arguments={"pipeline_kwargs": {**call, "output_type": latents}},
        **about,
    )


def pretrained(load: Callable[..., Any], source: str, **settings: Any) -> Any:
    """What ``load`` makes of published weights.

    Raises:
        AttachError: they are not here and cannot be had.
    """
    try:
        return load(source, **settings)
    except (OSError, ValueError, ImportError) as error:
        raise AttachError(
            "the weights cannot be loaded",
            where=source,
            got=str(error).strip().splitlines()[0],
            allowed="a folder that holds them, or a name on the hub that this machine can download",
            todo=f"on a machine with a network: `hf download {source} --local-dir FOLDER`, then --model FOLDER; "
            "or try the script without weights: --random-weights --tiny",
        ) from error
