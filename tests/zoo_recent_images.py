"""More image denoisers of diffusers, most of them recent: tiny, random weights, called as their pipelines call them.

As in :mod:`zoo_images`, ``tokens`` counts the image's tokens alone where text joins them.

Letters: B batch, N image tokens, L text tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Final

import torch
from models import Call, Case, Draw
from zoo_joint import TEXT, build, each, grid_ids, paths, words
from zoo_recent_joint import ernie_image, flux3, glm_image, ideogram4, joy_image, krea2, ovis_image, prx
from zoo_recent_unets import amused, ddpm_unet, dreamlite, kandinsky3, sdxl


def hidream(*, doubles: int = 2, singles: int = 2, experts: int = 0, seed: int = 0) -> Case:
    """HiDream-I1 with dense blocks: text last; a third of it is each block's own and goes no further.

    Its published weights have experts, for which Dynamo gives up the forward, and no plan can name its parts.
    """
    from diffusers import HiDreamImageTransformer2DModel

    layers = doubles + singles
    model = build(
        HiDreamImageTransformer2DModel,
        seed=seed,
        patch_size=2,
        in_channels=4,
        num_layers=doubles,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=3,
        caption_channels=[24, 20],
        text_emb_dim=28,
        num_routed_experts=experts,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(16, 16),
        llama_layers=list(range(layers)),
    )

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(4, 16, 16),
            "timesteps": each(by, float(by.timestep)),
            "encoder_hidden_states_t5": words(by, TEXT, 24),
            "encoder_hidden_states_llama3": words(by, layers, TEXT, 20).transpose(0, 1).contiguous(),
            "pooled_embeds": words(by, 28, loud=1.0),
            "attention_kwargs": None,
            "return_dict": False,
        }

    sites = paths(("double_stream_blocks", doubles), ("single_stream_blocks", singles), attn="block.attn1")
    return Case("hidream", model, draw, sites, (), layers, "uncond_first", 64)


def kandinsky5(*, layers: int = 3, refiners: int = 1, seed: int = 0) -> Case:
    """Kandinsky 5: channels last, one frame; rotated queries and keys pass through bfloat16; CFG takes two calls."""
    from diffusers import Kandinsky5Transformer3DModel

    model = build(
        Kandinsky5Transformer3DModel,
        seed=seed,
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=20,
        time_dim=32,
        model_dim=48,
        ff_dim=96,
        num_text_blocks=refiners,
        num_visual_blocks=layers,
        axes_dims=(4, 6, 6),
    )

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(1, 16, 16, 4),
            "encoder_hidden_states": words(by, TEXT, 24),
            "pooled_projections": words(by, 20, loud=1.0),
            "timestep": each(by, float(by.timestep)).clone(),
            "visual_rope_pos": [torch.arange(1), torch.arange(8), torch.arange(8)],
            "text_rope_pos": torch.arange(TEXT),
            "scale_factor": [1.0, 1.0, 1.0],
            "sparse_params": None,
            "return_dict": True,
        }

    sites = paths(("visual_transformer_blocks", layers), attn="self_attention")
    texts = paths(("text_transformer_blocks", refiners), attn="self_attention")
    rejected = (*texts, *paths(("visual_transformer_blocks", layers), attn="cross_attention"))
    return Case("kandinsky5", model, draw, sites, rejected, layers + refiners, None, 64, batch=2)


def bria(*, doubles: int = 2, singles: int = 2, seed: int = 0) -> Case:
    """Bria 3: FLUX's blocks without pooled text and guidance as an input; CFG doubles the batch."""
    from diffusers.models import BriaTransformer2DModel

    model = build(
        BriaTransformer2DModel,
        seed=seed,
        in_channels=16,
        num_layers=doubles,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=24,
        axes_dims_rope=[4, 6, 6],
    )

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(64, 16),
            "timestep": each(by, float(by.timestep)),
            "encoder_hidden_states": words(by, TEXT, 24),
            "attention_kwargs": None,
            "return_dict": False,
            "txt_ids": torch.zeros(TEXT, 3),
            "img_ids": grid_ids(8, 8),
        }

    sites = paths(("transformer_blocks", doubles), ("single_transformer_blocks", singles))
    return Case("bria", model, draw, sites, (), doubles + singles, "uncond_first", 64)


def bria_fibo(*, doubles: int = 2, singles: int = 2, seed: int = 0) -> Case:
    """Bria FIBO: half of the text's channels are written over before each block; a mask [B, 1, L + N, L + N]."""
    from diffusers.models import BriaFiboTransformer2DModel

    layers = doubles + singles
    model = build(
        BriaFiboTransformer2DModel,
        seed=seed,
        in_channels=16,
        num_layers=doubles,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=40,
        axes_dims_rope=[4, 6, 6],
        text_encoder_dim=20,
    )

    def draw(by: Draw) -> Call:
        real = torch.cat([by.key_mask(TEXT), torch.ones(by.batch, 64, dtype=torch.bool)], dim=1).float()
        pairs = torch.einsum("bi,bj->bij", real, real)
        return (), {
            "hidden_states": by.latents(64, 16),
            "timestep": each(by, float(by.timestep)),
            "encoder_hidden_states": words(by, TEXT, 40),
            "text_encoder_layers": [words(by, TEXT, 20) for _ in range(layers)],
            "joint_attention_kwargs": {"attention_mask": torch.where(pairs == 1, 0.0, -torch.inf)[:, None]},
            "return_dict": False,
            "txt_ids": torch.zeros(TEXT, 3),
            "img_ids": grid_ids(8, 8),
        }

    sites = paths(("transformer_blocks", doubles), ("single_transformer_blocks", singles))
    return Case("bria_fibo", model, draw, sites, (), layers, "uncond_first", 64)


def cogview3plus(*, layers: int = 3, seed: int = 0) -> Case:
    """CogView 3 Plus: text first, both embedded as one sequence and parted in each block, with one feed-forward."""
    from diffusers import CogView3PlusTransformer2DModel

    model = build(
        CogView3PlusTransformer2DModel,
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
        pos_embed_max_size=12,
    )

    def draw(by: Draw) -> Call:
        pixels = torch.tensor([[128.0, 128.0]]).repeat(by.batch, 1)
        return (), {
            "hidden_states": by.latents(4, 16, 16),
            "encoder_hidden_states": words(by, TEXT, 24),
            "timestep": each(by, int(by.timestep)),
            "original_size": pixels,
            "target_size": pixels,
            "crop_coords": torch.zeros(by.batch, 2),
            "return_dict": False,
        }

    sites = paths(("transformer_blocks", layers), attn="attn1")
    return Case("cogview3plus", model, draw, sites, (), layers, "uncond_first", 64)


def hunyuan_image(*, doubles: int = 2, singles: int = 2, refiners: int = 1, seed: int = 0) -> Case:
    """HunyuanImage 2.1: text last, with refiners that never see the image; a mask [B, 1, 1, N + L]; two calls for CFG.

    Its second text, of glyphs, is left out: Dynamo gives up the forward where both are put in order by their masks.
    """
    from diffusers import HunyuanImageTransformer2DModel

    model = build(
        HunyuanImageTransformer2DModel,
        seed=seed,
        in_channels=16,
        out_channels=16,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=doubles,
        num_single_layers=singles,
        num_refiner_layers=refiners,
        text_embed_dim=24,
        rope_axes_dim=(8, 8),
    )

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(16, 8, 8),
            "timestep": each(by, float(by.timestep)),
            "timestep_r": None,
            "guidance": None,
            "attention_kwargs": {},
            "return_dict": False,
            "encoder_hidden_states": words(by, TEXT, 24),
            "encoder_attention_mask": by.key_mask(TEXT).long(),
        }

    sites = paths(("transformer_blocks", doubles), ("single_transformer_blocks", singles))
    rejected = paths(("context_embedder.token_refiner.refiner_blocks", refiners))
    return Case("hunyuan_image", model, draw, sites, rejected, doubles + singles, None, 64, batch=2)


def omnigen(*, layers: int = 3, seed: int = 0) -> Case:
    """OmniGen: text, the timestep as a token, image; text is causal, and padded before its beginning.

    Dynamo breaks the graph behind their concatenation, so the sites are self-attention of all tokens together.
    """
    from diffusers import OmniGenTransformer2DModel

    model = build(
        OmniGenTransformer2DModel,
        seed=seed,
        in_channels=4,
        patch_size=2,
        hidden_size=48,
        num_attention_heads=3,
        num_key_value_heads=3,
        intermediate_size=96,
        num_layers=layers,
        pad_token_id=0,
        vocab_size=32,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        pos_embed_max_size=12,
        time_step_dim=32,
    )
    tokens = TEXT + 1 + 64

    def draw(by: Draw) -> Call:
        padding = TEXT - by.key_mask(TEXT).sum(1, keepdim=True)
        place = torch.arange(tokens)
        real = place >= padding
        sees = (place[:, None] >= place) | (place[:, None] > TEXT)
        pairs = torch.where(real[:, :, None], sees & real[:, None, :], torch.tensor(True))
        names = torch.randint(1, 32, (by.batch, TEXT), generator=by.generator)
        if by.same_halves:
            names = names[: by.batch // 2].repeat(2, 1)
        return (), {
            "hidden_states": by.latents(4, 16, 16),
            "timestep": each(by, by.timestep / 1000),
            "input_ids": names.masked_fill(~real[:, :TEXT], 0),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": pairs.float(),
            "position_ids": (place - padding).clamp(min=0),
            "return_dict": False,
        }

    sites = paths(("layers", layers), attn="self_attn")
    return Case("omnigen", model, draw, sites, (), layers, "cond_first", tokens)


TEXT_TOKENS: Final[Mapping[str, tuple[int, str]]] = {
    "hidream": (3 * TEXT, "last"),
    "bria": (TEXT, "first"),
    "bria_fibo": (TEXT, "first"),
    "cogview3plus": (TEXT, "first"),
    "hunyuan_image": (TEXT, "last"),
    "prx": (TEXT, "first"),
    "krea2": (TEXT, "first"),
    "glm_image": (TEXT, "first"),
    "ernie_image": (TEXT, "last"),
    "joy_image": (TEXT, "last"),
    "ovis_image": (TEXT, "first"),
    "flux3": (TEXT, "first"),
    "flux3_given": (TEXT, "both"),
}
"""As :data:`zoo_images.TEXT_TOKENS`."""

IMAGE_ONLY: Final[Mapping[str, tuple[str, ...]]] = {
    "flux3": ("mode_blocks.image.0.attn",),
    "flux3_given": ("mode_blocks.image.0.attn",),
}
"""As :data:`zoo_images.IMAGE_ONLY`."""

ZOO_RECENT_IMAGES: Final[Mapping[str, Callable[[], Case]]] = {
    "hidream": hidream,
    "kandinsky5": kandinsky5,
    "bria": bria,
    "bria_fibo": bria_fibo,
    "cogview3plus": cogview3plus,
    "hunyuan_image": hunyuan_image,
    "omnigen": omnigen,
    "prx": prx,
    "krea2": krea2,
    "glm_image": glm_image,
    "ernie_image": ernie_image,
    "ideogram4": ideogram4,
    "joy_image": joy_image,
    "ovis_image": ovis_image,
    "flux3": flux3,
    "flux3_given": functools.partial(flux3, given=TEXT),
    "sdxl": sdxl,
    "ddpm_unet": ddpm_unet,
    "kandinsky3": kandinsky3,
    "dreamlite": dreamlite,
    "amused": amused,
}
"""Name to builder, as :data:`models.CASES`."""
