"""Real video denoisers of diffusers that are convolution nets: tiny, random weights, called as their pipelines do.

Spatial attention sees one frame, temporal attention one place in all frames; both fold the rest into the batch.
See :mod:`zoo_video` for the letters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from models import Call, Case, Draw
from zoo_joint import TEXT, build, words

FRAMES: Final = 4
ROWS: Final = 8

SIZES: Final[Mapping[str, Any]] = {
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 20,
}
"""Two levels, of ROWS and ROWS / 2 rows; attention to text at the upper one and in the middle."""

NET_3D: Final[Mapping[str, Any]] = {
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    **SIZES,
}
"""The same of the nets whose temporal layers are built in."""

SPATIAL: Final = (("down_blocks.0", 0), ("mid_block", 0), ("up_blocks.1", 0), ("up_blocks.1", 1))
"""Modules and numbers of the attention to text."""

MOTION: Final = (
    *(("down_blocks.0", 0), ("down_blocks.1", 0), ("mid_block", 0), ("up_blocks.0", 0), ("up_blocks.0", 1)),
    *(("up_blocks.1", 0), ("up_blocks.1", 1)),
)
"""Of AnimateDiff's motion modules, which all levels have."""

FIRST: Final = tuple(f"transformer_in.transformer_blocks.0.{attn}" for attn in ("attn1", "attn2"))
"""Temporal attention before the first level."""


def across() -> tuple[str, ...]:
    """Paths of the cross-attention of every spatial place."""
    return tuple(f"{module}.attentions.{number}.transformer_blocks.0.attn2" for module, number in SPATIAL)


def spatial_and_temporal(temporal: str, twice: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """Paths of self-attention: spatial ones, each followed by two of the temporal module at the same place."""
    found: list[str] = []
    for module, number in twice:
        if (module, number) in SPATIAL:
            found.append(f"{module}.attentions.{number}.transformer_blocks.0.attn1")
        found += [f"{module}.{temporal}.{number}.transformer_blocks.0.{attn}" for attn in ("attn1", "attn2")]
    return tuple(found)


def svd(*, seed: int = 0) -> Case:
    """Stable Video Diffusion: after each spatial block a temporal one, and the two are blended.

    An image is the only token that both kinds of block read across.
    """
    from diffusers import UNetSpatioTemporalConditionModel

    model = build(
        UNetSpatioTemporalConditionModel,
        seed=seed,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_attention_heads=(2, 2),
        num_frames=FRAMES,
        **SIZES,
    )

    def draw(by: Draw) -> Call:
        return (by.latents(FRAMES, 8, ROWS, ROWS), torch.tensor(float(by.timestep))), {
            "encoder_hidden_states": words(by, 1, 20),
            "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(by.batch, 1),
            "return_dict": False,
        }

    blocks = [
        f"{module}.attentions.{number}.{kind}transformer_blocks.0"
        for module, number in SPATIAL
        for kind in ("", "temporal_")
    ]
    sites, rejected = (tuple(f"{block}.{attn}" for block in blocks) for attn in ("attn1", "attn2"))
    return Case("svd", model, draw, sites, rejected, 8, "uncond_first", ROWS**2)


def animatediff(*, seed: int = 0) -> Case:
    """AnimateDiff: a text-to-image net with motion modules, which attend twice over all frames of a place."""
    from diffusers import UNetMotionModel

    model = build(
        UNetMotionModel,
        seed=seed,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        norm_num_groups=8,
        num_attention_heads=2,
        motion_max_seq_length=8,
        motion_num_attention_heads=2,
        **SIZES,
    )

    def draw(by: Draw) -> Call:
        prompts = words(by, TEXT, 20).repeat_interleave(FRAMES, dim=0)
        return (by.latents(4, FRAMES, ROWS, ROWS), torch.tensor(int(by.timestep))), {
            "encoder_hidden_states": prompts,
            "cross_attention_kwargs": None,
            "added_cond_kwargs": None,
        }

    sites = spatial_and_temporal("motion_modules", MOTION)
    return Case("animatediff", model, draw, sites, across(), 11, "uncond_first", ROWS**2)


def text_to_video(*, seed: int = 0) -> Case:
    """ModelScope's net: temporal convolutions, and temporal attention that is self-attention twice over."""
    from diffusers import UNet3DConditionModel

    model = build(
        UNet3DConditionModel,
        seed=seed,
        **NET_3D,
    )

    def draw(by: Draw) -> Call:
        return (by.latents(4, FRAMES, ROWS, ROWS), torch.tensor(int(by.timestep))), {
            "encoder_hidden_states": words(by, TEXT, 20),
            "cross_attention_kwargs": None,
            "return_dict": False,
        }

    sites = (*FIRST, *spatial_and_temporal("temp_attentions", SPATIAL))
    return Case("text_to_video", model, draw, sites, across(), 9, "uncond_first", ROWS**2)


def i2vgen(*, seed: int = 0) -> Case:
    """I2VGen-XL: text, image and the image's latents are what it reads across; these pass an encoder of their own."""
    from diffusers import I2VGenXLUNet

    model = build(
        I2VGenXLUNet,
        seed=seed,
        **NET_3D,
    )

    def draw(by: Draw) -> Call:
        return (by.latents(4, FRAMES, ROWS, ROWS), torch.tensor(int(by.timestep))), {
            "encoder_hidden_states": words(by, TEXT, 20),
            "fps": torch.tensor([16]).repeat(by.batch),
            "image_latents": by.latents(4, FRAMES, ROWS, ROWS),
            "image_embeddings": words(by, 20),
            "cross_attention_kwargs": None,
            "return_dict": False,
        }

    sites = (*FIRST, *spatial_and_temporal("temp_attentions", SPATIAL))
    rejected = ("image_latents_temporal_encoder.attn1", *across())
    return Case("i2vgen", model, draw, sites, rejected, 9, "uncond_first", ROWS**2)


ZOO_VIDEO_UNETS: Final[Mapping[str, Callable[[], Case]]] = {
    "svd": svd,
    "animatediff": animatediff,
    "text_to_video": text_to_video,
    "i2vgen": i2vgen,
}
"""Name to builder, as :data:`models.CASES`."""
