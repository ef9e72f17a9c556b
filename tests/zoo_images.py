"""Real image denoisers of diffusers: tiny, with random weights, called as their pipelines call them.

Those whose attention joins text and image are in :mod:`zoo_joint` and :mod:`zoo_stream`. Here are the
others, and all by name in :data:`ZOO_IMAGES`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Final

import torch
from models import Call, Case, Draw
from torch import nn
from zoo_joint import TEXT, auraflow, build, chroma, each, flux, flux2, paths, qwen_image, sd3, words
from zoo_stream import cogview4, lumina2, z_image


def pixart_sigma(*, layers: int = 3, seed: int = 0) -> Case:
    """PixArt-Sigma: predicts a variance too, is not told resolution and aspect ratio; captions are ragged."""
    from diffusers import PixArtTransformer2DModel

    model = build(
        PixArtTransformer2DModel,
        seed=seed,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=layers,
        cross_attention_dim=48,
        sample_size=16,
        patch_size=2,
        interpolation_scale=1,
        caption_channels=20,
        use_additional_conditions=False,
    )

    def draw(by: Draw) -> Call:
        return (by.latents(4, 16, 16),), {
            "encoder_hidden_states": words(by, TEXT, 20),
            "encoder_attention_mask": by.key_mask(TEXT).long(),
            "timestep": each(by, int(by.timestep)),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "return_dict": False,
        }

    sites, rejected = (paths(("transformer_blocks", layers), attn=attn) for attn in ("attn1", "attn2"))
    return Case("pixart_sigma", model, draw, sites, rejected, layers, "uncond_first", 64)


def hunyuan_dit(*, layers: int = 4, seed: int = 0) -> Case:
    """Hunyuan-DiT: rotary tables, long skips, two texts by cross-attention, one of them pooled by attention."""
    from diffusers import HunyuanDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    clip, t5 = 6, 8
    model = build(
        HunyuanDiT2DModel,
        seed=seed,
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=48,
        num_layers=layers,
        cross_attention_dim=24,
        cross_attention_dim_t5=32,
        pooled_projection_dim=20,
        text_len=clip,
        text_len_t5=t5,
    )
    tables = get_2d_rotary_pos_embed(16, ((0, 0), (8, 8)), (8, 8), output_type="pt")

    def draw(by: Draw) -> Call:
        return (by.latents(4, 16, 16), by.times().float()), {
            "encoder_hidden_states": words(by, clip, 24),
            "text_embedding_mask": by.key_mask(clip).long(),
            "encoder_hidden_states_t5": words(by, t5, 32),
            "text_embedding_mask_t5": by.key_mask(t5).long(),
            "image_meta_size": torch.tensor([[128.0, 128, 128, 128, 0, 0]]).repeat(by.batch, 1),
            "style": torch.zeros(by.batch, dtype=torch.long),
            "image_rotary_emb": tables,
            "return_dict": False,
        }

    sites, crosses = (paths(("blocks", layers), attn=attn) for attn in ("attn1", "attn2"))
    rejected = ("time_extra_emb.pooler", *crosses)
    return Case("hunyuan_dit", model, draw, sites, rejected, layers, "uncond_first", 64)


def lumina_next(*, layers: int = 3, seed: int = 0) -> Case:
    """Lumina-Next: grouped heads, complex rotary tables; self- and cross-attention share attn2's projection."""
    from diffusers import LuminaNextDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    model = build(
        LuminaNextDiT2DModel,
        seed=seed,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=64,
        num_layers=layers,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=24,
    )
    nn.init.zeros_(model.pad_token)  # diffusers leaves it uninitialised, and unused
    tables = get_2d_rotary_pos_embed_lumina(16, 384, 384)

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(4, 16, 16),
            "timestep": 1 - each(by, float(by.timestep)) / 1000,
            "encoder_hidden_states": words(by, TEXT, 24),
            "encoder_mask": by.key_mask(TEXT).long(),
            "image_rotary_emb": tables,
            "cross_attention_kwargs": {"base_sequence_length": 64},
            "return_dict": False,
        }

    sites, rejected = (paths(("layers", layers), attn=attn) for attn in ("attn1", "attn2"))
    return Case("lumina_next", model, draw, sites, rejected, layers, "cond_first", 64)


def sana(*, layers: int = 2, seed: int = 0) -> Case:
    """Sana: its self-attention is linear, without a softmax, and so no site; captions are ragged."""
    from diffusers import SanaTransformer2DModel

    model = build(
        SanaTransformer2DModel,
        seed=seed,
        in_channels=4,
        out_channels=4,
        num_attention_heads=6,
        attention_head_dim=8,
        num_layers=layers,
        num_cross_attention_heads=3,
        cross_attention_head_dim=16,
        cross_attention_dim=48,
        caption_channels=20,
        sample_size=8,
    )

    def draw(by: Draw) -> Call:
        return (by.latents(4, 8, 8),), {
            "encoder_hidden_states": words(by, TEXT, 20),
            "encoder_attention_mask": by.key_mask(TEXT).long(),
            "timestep": each(by, int(by.timestep)) * 1.0,
            "return_dict": False,
            "attention_kwargs": None,
        }

    rejected = [f"transformer_blocks.{layer}.{attn}" for layer in range(layers) for attn in ("attn1", "attn2")]
    return Case("sana", model, draw, (), tuple(rejected), layers, "uncond_first", 64)


def unet(*, seed: int = 0) -> Case:
    """Stable Diffusion 1's U-Net cut to two resolutions: attention between convolutions, 144 and 36 tokens."""
    from diffusers import UNet2DConditionModel

    model = build(
        UNet2DConditionModel,
        seed=seed,
        sample_size=12,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=4,  # the number of heads, as in Stable Diffusion 1's own configuration
    )

    def draw(by: Draw) -> Call:
        return (by.latents(4, 12, 12), torch.tensor(int(by.timestep))), {
            "encoder_hidden_states": words(by, TEXT, 24),
            "timestep_cond": None,
            "cross_attention_kwargs": None,
            "added_cond_kwargs": None,
            "return_dict": False,
        }

    places = ("down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0")
    blocks = [f"{place}.transformer_blocks.0" for place in (*places, "up_blocks.1.attentions.1")]
    sites, rejected = ([f"{block}.{attn}" for block in blocks] for attn in ("attn1", "attn2"))
    return Case("unet", model, draw, tuple(sites), tuple(rejected), len(blocks), "uncond_first", 144)


TEXT_TOKENS: Final[Mapping[str, tuple[int, str]]] = {
    "sd3": (TEXT, "last"),
    "sd35": (TEXT, "last"),
    "flux": (TEXT, "first"),
    "flux2": (TEXT, "first"),
    "chroma": (TEXT, "first"),
    "auraflow": (TEXT + 8, "first"),
    "qwen_image": (TEXT, "first"),
    "lumina2": (TEXT - 4, "first"),
    "cogview4": (TEXT, "first"),
    "z_image": (32, "last"),
}
"""Name of a case with joint attention to the number of tokens beside the image's, and their side."""

IMAGE_ONLY: Final[Mapping[str, tuple[str, ...]]] = {
    "sd35": ("transformer_blocks.0.attn2", "transformer_blocks.1.attn2"),
    "lumina2": ("noise_refiner.0.attn",),
    "z_image": ("noise_refiner.0.attention",),
}
"""Name of a case with joint attention to those of its sites that no text joins."""

SMALLER: Final[Mapping[str, Mapping[str, int]]] = {
    "unet": {"mid_block.attentions.0.transformer_blocks.0.attn1": 36},
}
"""Name of a case to those of its sites that have another number of tokens than its ``tokens``."""

ZOO_IMAGES: Final[Mapping[str, Callable[[], Case]]] = {
    "pixart_sigma": pixart_sigma,
    "hunyuan_dit": hunyuan_dit,
    "lumina_next": lumina_next,
    "sana": sana,
    "unet": unet,
    "sd3": sd3,
    "sd35": functools.partial(sd3, dual=2),
    "flux": flux,
    "flux2": flux2,
    "chroma": chroma,
    "auraflow": auraflow,
    "qwen_image": qwen_image,
    "lumina2": lumina2,
    "cogview4": cogview4,
    "z_image": z_image,
}
"""Name to builder, as :data:`models.CASES`."""
