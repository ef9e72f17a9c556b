"""Wan and its descendants: tiny, random weights, called as their pipelines call them.

See :mod:`zoo_video`, whose sizes and letters these have, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from models import Call, Case, Draw
from torch import Tensor
from zoo_joint import TEXT, build, each, paths, words
from zoo_video import FRAMES, HEIGHT, TOKENS, WIDTH

WAN: Final[Mapping[str, Any]] = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "out_channels": 4,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 96,
    "rope_max_seq_len": 32,
}
"""What Wan and its descendants are built with."""


def frames_times(by: Draw, first: float = 0.0) -> Tensor:
    """Timesteps [B, T] where the first frame is given: it is clean, and the others are at the step's time."""
    times = torch.full((by.batch, FRAMES), float(by.timestep))
    times[:, 0] = first
    return times


def wan_i2v(*, edit: bool = False, layers: int = 3, seed: int = 0) -> Case:
    """Wan 2.1 from an image: the image's own keys and values beside the text's, in cross-attention.

    With ``edit``, ChronoEdit: two frames only, at places far apart in time.
    """
    from diffusers import ChronoEditTransformer3DModel, WanTransformer3DModel

    model = build(
        ChronoEditTransformer3DModel if edit else WanTransformer3DModel,
        seed=seed,
        num_layers=layers,
        in_channels=12,
        image_dim=24,
        added_kv_proj_dim=48,
        **WAN,
    )
    frames = 2 if edit else FRAMES

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(12, frames, HEIGHT, WIDTH),
            "timestep": each(by, int(by.timestep)),
            "encoder_hidden_states": words(by, 512, 20),
            "encoder_hidden_states_image": words(by, 9, 24),
            "attention_kwargs": None,
            "return_dict": False,
        }

    blocks = [f"blocks.{layer}" for layer in range(layers)]
    rejected = tuple(path for block in blocks for path in (f"{block}.attn2", f"{block}.attn2#1"))
    sites = paths(("blocks", layers), attn="attn1")
    name = "chronoedit" if edit else "wan_i2v"
    return Case(name, model, draw, sites, rejected, layers, None, frames * TOKENS // FRAMES, batch=2)


def wan_ti2v(*, layers: int = 3, seed: int = 0) -> Case:
    """Wan 2.2 from text and image: each token has its time, [B, N], and those of the first frame are at 0."""
    from diffusers import WanTransformer3DModel

    model = build(
        WanTransformer3DModel,
        seed=seed,
        num_layers=layers,
        in_channels=4,
        **WAN,
    )

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(4, FRAMES, HEIGHT, WIDTH),
            "timestep": frames_times(by).repeat_interleave(TOKENS // FRAMES, dim=1),
            "encoder_hidden_states": words(by, TEXT, 20),
            "encoder_hidden_states_image": None,
            "attention_kwargs": None,
            "return_dict": False,
        }

    sites, rejected = (paths(("blocks", layers), attn=attn) for attn in ("attn1", "attn2"))
    return Case("wan_ti2v", model, draw, sites, rejected, layers, None, TOKENS, batch=2)


def skyreels(*, forcing: bool = False, layers: int = 3, seed: int = 0) -> Case:
    """SkyReels V2, as Wan.  With ``forcing`` times are [B, T] and a mask [1, 1, N, N] hides later blocks of frames."""
    from diffusers import SkyReelsV2Transformer3DModel

    frames = 4 if forcing else FRAMES
    model = build(
        SkyReelsV2Transformer3DModel,
        seed=seed,
        num_layers=layers,
        in_channels=4,
        **WAN,
        num_frame_per_block=2 if forcing else 1,
    )

    def draw(by: Draw) -> Call:
        call = {
            "hidden_states": by.latents(4, frames, HEIGHT, WIDTH),
            "timestep": each(by, int(by.timestep)),
            "encoder_hidden_states": words(by, TEXT, 20),
            "attention_kwargs": None,
            "return_dict": False,
        }
        if forcing:
            times = (int(by.timestep) - torch.tensor([80, 80, 0, 0])).clamp(0)
            call |= {
                "timestep": times.expand(by.batch, -1),
                "fps": torch.tensor([24]),
                "enable_diffusion_forcing": True,
            }
        return (), call

    sites, rejected = (paths(("blocks", layers), attn=attn) for attn in ("attn1", "attn2"))
    name = "skyreels_forcing" if forcing else "skyreels"
    return Case(name, model, draw, sites, rejected, layers, None, frames * TOKENS // FRAMES, batch=2)


def wan_vace(*, layers: int = 3, seed: int = 0) -> Case:
    """Wan VACE: a control video runs through blocks of its own first, joined with the latents in the first."""
    from diffusers import WanVACETransformer3DModel

    model = build(
        WanVACETransformer3DModel,
        seed=seed,
        num_layers=layers,
        in_channels=4,
        **WAN,
        vace_layers=[0, 2],
        vace_in_channels=10,
    )

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(4, FRAMES, HEIGHT, WIDTH),
            "timestep": each(by, int(by.timestep)),
            "encoder_hidden_states": words(by, TEXT, 20),
            "control_hidden_states": by.latents(10, FRAMES, HEIGHT, WIDTH),
            "control_hidden_states_scale": torch.ones(2),
            "attention_kwargs": None,
            "return_dict": False,
        }

    sites, rejected = (paths(("vace_blocks", 2), ("blocks", layers), attn=attn) for attn in ("attn1", "attn2"))
    return Case("wan_vace", model, draw, sites, rejected, layers + 2, None, TOKENS, batch=2)


ZOO_WAN: Final[Mapping[str, Callable[[], Case]]] = {
    "wan_i2v": wan_i2v,
    "wan_ti2v": wan_ti2v,
    "skyreels": skyreels,
    "skyreels_forcing": functools.partial(skyreels, forcing=True),
    "wan_vace": wan_vace,
    "chronoedit": functools.partial(wan_i2v, edit=True),
}
"""Name to builder, as :data:`models.CASES`."""
