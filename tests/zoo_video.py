"""Real video and audio denoisers of diffusers: tiny, with random weights, called as their pipelines call them.

All by name in :data:`ZOO_VIDEO`; all trace as one graph. ``tokens`` of each :class:`~models.Case` counts the latents'
tokens alone; :data:`TEXT_TOKENS` says how many others stand before or behind them.

Letters: B batch, T latent frames, S tokens of a frame, N latent tokens of all frames, L text tokens, C channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Final

import torch
from models import Call, Case, Draw
from zoo_joint import TEXT, build, each, paths, words

FRAMES: Final = 3
HEIGHT: Final = 8
WIDTH: Final = 12
"""Of latents, in patches of 1 x 2 x 2."""

TOKENS: Final = FRAMES * (HEIGHT // 2) * (WIDTH // 2)
"""N, of the denoisers that attend over all frames at once."""

LATTE_TEMPORAL: Final = "temporal_transformer_blocks"


def latte(*, layers: int = 2, frames: int = 5, seed: int = 0) -> Case:
    """Latte: spatial blocks over S = 36 tokens and temporal ones over T = 5 in turn, captions for the former only."""
    from diffusers import LatteTransformer3DModel

    model = build(
        LatteTransformer3DModel,
        seed=seed,
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=48,
        attention_bias=True,
        sample_size=12,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=20,
        video_length=frames,
    )

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(4, frames, 12, 12),
            "encoder_hidden_states": words(by, TEXT, 20),
            "timestep": each(by, int(by.timestep)),
            "enable_temporal_attentions": True,
            "return_dict": False,
        }

    sites = tuple(f"{kind}.{layer}.attn1" for layer in range(layers) for kind in ("transformer_blocks", LATTE_TEMPORAL))
    rejected = paths(("transformer_blocks", layers), attn="attn2")
    return Case("latte", model, draw, sites, rejected, 2 * layers, "uncond_first", 36)


def cogvideox(*, rotary: bool = False, layers: int = 3, seed: int = 0) -> Case:
    """CogVideoX-2B, or with ``rotary`` 5B: text and all frames are one sequence, text first.

    Rotary tables are for the video's part alone, and are written into a slice of q and k.
    """
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    model = build(
        CogVideoXTransformer3DModel,
        seed=seed,
        gain=2.5,
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=32,
        text_embed_dim=24,
        num_layers=layers,
        sample_width=WIDTH,
        sample_height=HEIGHT,
        sample_frames=4 * (FRAMES - 1) + 1,
        patch_size=2,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=rotary,
    )
    grid = (HEIGHT // 2, WIDTH // 2)
    crop = get_resize_crop_region_for_grid(grid, WIDTH // 2, HEIGHT // 2)
    tables = get_3d_rotary_pos_embed(16, crop, grid, FRAMES) if rotary else None

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(FRAMES, 4, HEIGHT, WIDTH),
            "encoder_hidden_states": words(by, TEXT, 24),
            "timestep": each(by, int(by.timestep)),
            "image_rotary_emb": tables,
            "attention_kwargs": None,
            "return_dict": False,
        }

    sites = paths(("transformer_blocks", layers), attn="attn1")
    name = "cogvideox_rotary" if rotary else "cogvideox"
    return Case(name, model, draw, sites, (), layers, "uncond_first", TOKENS)


def ltx(*, layers: int = 3, seed: int = 0) -> Case:
    """LTX-Video: packed latents, rotary tables [B, N, D] for q and k before their heads part; captions are padded."""
    from diffusers import LTXVideoTransformer3DModel

    model = build(
        LTXVideoTransformer3DModel,
        seed=seed,
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=16,
        cross_attention_dim=64,
        num_layers=layers,
        caption_channels=20,
    )
    rows, columns = HEIGHT // 2, WIDTH // 2

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(TOKENS, 8),
            "encoder_hidden_states": words(by, TEXT, 20),
            "timestep": each(by, float(by.timestep)),
            "encoder_attention_mask": by.key_mask(TEXT),
            "num_frames": FRAMES,
            "height": rows,
            "width": columns,
            "rope_interpolation_scale": (8 / 25, 32, 32),
            "attention_kwargs": None,
            "return_dict": False,
        }

    sites, rejected = (paths(("transformer_blocks", layers), attn=attn) for attn in ("attn1", "attn2"))
    return Case("ltx", model, draw, sites, rejected, layers, "uncond_first", TOKENS)


def wan(*, layers: int = 3, seed: int = 0) -> Case:
    """Wan 2.1: rotary tables written into even and odd channels; CFG takes two calls."""
    from diffusers import WanTransformer3DModel

    model = build(
        WanTransformer3DModel,
        seed=seed,
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=20,
        freq_dim=32,
        ffn_dim=96,
        num_layers=layers,
        rope_max_seq_len=32,
    )

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(4, FRAMES, HEIGHT, WIDTH),
            "timestep": each(by, int(by.timestep)),
            "encoder_hidden_states": words(by, TEXT, 20),
            "attention_kwargs": None,
            "return_dict": False,
        }

    sites, rejected = (paths(("blocks", layers), attn=attn) for attn in ("attn1", "attn2"))
    return Case("wan", model, draw, sites, rejected, layers, None, TOKENS, batch=2)


def allegro(*, layers: int = 3, seed: int = 0) -> Case:
    """Allegro: rotary tables for each axis, looked up by position; captions [B, 1, L, C] are padded."""
    from diffusers import AllegroTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    model = build(
        AllegroTransformer3DModel,
        seed=seed,
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        cross_attention_dim=48,
        sample_height=HEIGHT,
        sample_width=WIDTH,
        sample_frames=FRAMES,
        caption_channels=20,
    )
    grid = (HEIGHT // 2, WIDTH // 2)
    *tables, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(24, ((0, 0), grid), grid, FRAMES, (2.2, 2.0, 2.0))
    positions = torch.cartesian_prod(grid_t.long(), grid_h.long(), grid_w.long()).T.reshape(3, 1, -1).contiguous()

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(4, FRAMES, HEIGHT, WIDTH),
            "encoder_hidden_states": words(by, 1, TEXT, 20),
            "encoder_attention_mask": by.key_mask(TEXT).long(),
            "timestep": each(by, float(by.timestep)),
            "image_rotary_emb": (tuple(tables), tuple(positions)),
            "return_dict": False,
        }

    sites, rejected = (paths(("transformer_blocks", layers), attn=attn) for attn in ("attn1", "attn2"))
    return Case("allegro", model, draw, sites, rejected, layers, "uncond_first", TOKENS)


def hunyuan_video(*, doubles: int = 2, singles: int = 2, seed: int = 0) -> Case:
    """HunyuanVideo: text last, a mask [B, 1, 1, N + L] for padded text, guidance as an input.

    Two blocks refine the text before; their attention never sees the video.
    """
    from diffusers import HunyuanVideoTransformer3DModel

    model = build(
        HunyuanVideoTransformer3DModel,
        seed=seed,
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=doubles,
        num_single_layers=singles,
        num_refiner_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=24,
        pooled_projection_dim=20,
        rope_axes_dim=(4, 6, 6),
    )

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(4, FRAMES, HEIGHT, WIDTH),
            "timestep": each(by, float(by.timestep)),
            "encoder_hidden_states": words(by, TEXT, 24),
            "encoder_attention_mask": by.key_mask(TEXT).float(),
            "pooled_projections": words(by, 20, loud=1.0),
            "guidance": torch.tensor([6.0] * by.batch) * 1000,
            "attention_kwargs": None,
            "return_dict": False,
        }

    sites = paths(("transformer_blocks", doubles), ("single_transformer_blocks", singles))
    rejected = paths(("context_embedder.token_refiner.refiner_blocks", 2))
    return Case("hunyuan_video", model, draw, sites, rejected, doubles + singles, None, TOKENS, batch=2)


def stable_audio(*, layers: int = 3, tokens: int = 64, seed: int = 0) -> Case:
    """Stable Audio: one token of time and duration comes before the sound's; half of each head is rotated.

    There are no gates.  The timestep is one number for the batch, from 0 to 1.  Cross-attention has grouped heads.
    """
    from diffusers import StableAudioDiTModel
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    model = build(
        StableAudioDiTModel,
        seed=seed,
        sample_size=tokens,
        in_channels=8,
        out_channels=8,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=32,
        time_proj_dim=32,
        global_states_input_dim=40,
        cross_attention_input_dim=20,
    )
    tables = get_1d_rotary_pos_embed(8, tokens + 1, use_real=True, repeat_interleave_real=False)

    def draw(by: Draw) -> Call:
        return (by.latents(8, tokens), torch.tensor([(by.timestep + 1) / 1000])), {
            "encoder_hidden_states": words(by, TEXT, 20),
            "global_hidden_states": by.latents(1, 40),
            "rotary_embedding": tables,
            "return_dict": False,
        }

    sites, rejected = (paths(("transformer_blocks", layers), attn=attn) for attn in ("attn1", "attn2"))
    return Case("stable_audio", model, draw, sites, rejected, layers, "uncond_first", tokens)


TEXT_TOKENS: Final[Mapping[str, tuple[int, str]]] = {
    "cogvideox": (TEXT, "first"),
    "cogvideox_rotary": (TEXT, "first"),
    "hunyuan_video": (TEXT, "last"),
    "stable_audio": (1, "first"),
}
"""Name of a case whose sites have other tokens than the latents' to how many these are, and their side."""

SMALLER: Final[Mapping[str, Mapping[str, int]]] = {
    "latte": {f"{LATTE_TEMPORAL}.{layer}.attn1": 5 for layer in range(2)},
}
"""Name of a case to those of its sites that have another number of tokens than its ``tokens``."""

ZOO_VIDEO: Final[Mapping[str, Callable[[], Case]]] = {
    "latte": latte,
    "cogvideox": cogvideox,
    "cogvideox_rotary": functools.partial(cogvideox, rotary=True),
    "ltx": ltx,
    "wan": wan,
    "allegro": allegro,
    "hunyuan_video": hunyuan_video,
    "stable_audio": stable_audio,
}
"""Name to builder, as :data:`models.CASES`."""
