"""Real image denoisers whose text and image are one sequence before the projections: tiny, random weights.

To attention alone this looks like self-attention over L + N tokens. See :mod:`zoo_joint`.

Letters: B batch, N image tokens, L text tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from models import Call, Case, Draw
from zoo_joint import TEXT, build, each, paths, words


def lumina2(*, layers: int = 2, refiners: int = 1, seed: int = 0) -> Case:
    """Lumina 2: ten of fourteen text tokens are real and come first; CFG takes two calls.

    The image alone passes noise refiners before it joins; the text's refiners never see the image.
    Four graphs; all sites are in the last.
    """
    from diffusers import Lumina2Transformer2DModel

    model = build(
        Lumina2Transformer2DModel,
        seed=seed,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=64,
        num_layers=layers,
        num_refiner_layers=refiners,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(32, 16, 16),
        cap_feat_dim=24,
    )

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(4, 16, 16),
            "timestep": each(by, 1 - by.timestep / 1000),
            "encoder_hidden_states": words(by, TEXT, 24),
            "encoder_attention_mask": (torch.arange(TEXT) < TEXT - 4).long().repeat(by.batch, 1),
            "return_dict": False,
            "attention_kwargs": None,
        }

    sites = paths(("noise_refiner", refiners), ("layers", layers))
    rejected = paths(("context_refiner", refiners))
    return Case("lumina2", model, draw, sites, rejected, layers + 2 * refiners, None, 64, batch=2)


def cogview4(*, layers: int = 3, seed: int = 0) -> Case:
    """CogView 4: text first; only the image's part is rotated, in place; CFG takes two calls."""
    from diffusers import CogView4Transformer2DModel

    model = build(
        CogView4Transformer2DModel,
        seed=seed,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=3,
        text_embed_dim=24,
        time_embed_dim=32,
        condition_dim=8,
        rope_axes_dim=(16, 16),
    )

    def draw(by: Draw) -> Call:
        pixels = torch.tensor([[128.0, 128.0]]).repeat(by.batch, 1)
        return (), {
            "hidden_states": by.latents(4, 16, 16),
            "encoder_hidden_states": words(by, TEXT, 24),
            "timestep": each(by, float(by.timestep)),
            "original_size": pixels,
            "target_size": pixels,
            "crop_coords": torch.zeros(by.batch, 2),
            "attention_kwargs": None,
            "return_dict": False,
        }

    sites = paths(("transformer_blocks", layers), attn="attn1")
    return Case("cogview4", model, draw, sites, (), layers, None, 64, batch=2)


def z_image(*, layers: int = 2, refiners: int = 1, seed: int = 0) -> Case:
    """Z-Image: lists of samples instead of batches; the text comes last, padded to 32 tokens.

    As in Lumina 2, image and text have refiners of their own. Six graphs, and one more on the second
    call, since its rotary tables fill on the first.
    """
    from diffusers import ZImageTransformer2DModel

    class Stacked(ZImageTransformer2DModel):
        """Hands out one tensor [B, C, 1, H, W] instead of a list."""

        def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
            return (torch.stack(super().forward(*args, **kwargs)[0]),)

    model = build(
        Stacked,
        seed=seed,
        in_channels=4,
        dim=48,
        n_layers=layers,
        n_refiner_layers=refiners,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )

    def draw(by: Draw) -> Call:
        images = list(by.latents(4, 1, 16, 16).unbind())
        prompts = list(words(by, TEXT, 24).unbind())
        return (images, (1000 - each(by, float(by.timestep))) / 1000, prompts), {
            "joint_attention_kwargs": None,
            "return_dict": False,
        }

    sites = paths(("noise_refiner", refiners), ("layers", layers), attn="attention")
    rejected = paths(("context_refiner", refiners), attn="attention")
    return Case("z_image", model, draw, sites, rejected, layers + 2 * refiners, "cond_first", 64)
