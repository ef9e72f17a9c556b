"""Denoisers of sound, of sound beside a video, and of videos that go on: tiny, called as their pipelines call them.

See :mod:`zoo_recent_video`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from models import Call, Case, Draw
from zoo_joint import TEXT, build, each, paths, words
from zoo_video import FRAMES, HEIGHT, TOKENS, WIDTH
from zoo_wan import WAN

SOUND: Final = 64
"""Tokens of sound."""

MEMORY: Final = 4
"""Learned tokens in front of Stable Audio 3's."""

PAST: Final = 56
"""Tokens of Helios' history: 48 of two frames, 6 of two more, and 2 of four."""


def stable_audio3(*, layers: int = 2, seed: int = 0) -> Case:
    """Stable Audio 3: two attentions a site, the second subtracted from the first; learned tokens come first."""
    from diffusers import StableAudio3DiTModel

    model = build(
        StableAudio3DiTModel,
        seed=seed,
        io_channels=8,
        embed_dim=128,
        depth=layers,
        num_heads=2,
        cond_token_dim=20,
        global_cond_dim=20,
        local_add_cond_dim=9,
        timestep_features_dim=16,
        ff_mult=2.0,
        num_memory_tokens=MEMORY,
    )

    def draw(by: Draw) -> Call:
        return (by.latents(8, SOUND), each(by, by.timestep / 1000)), {
            "encoder_hidden_states": words(by, TEXT, 20),
            "global_hidden_states": by.latents(20),
            "encoder_attention_mask": by.key_mask(TEXT).long(),
            "return_dict": False,
        }

    blocks = [f"transformer_blocks.{layer}" for layer in range(layers)]
    sites, rejected = (
        tuple(f"{block}.{attn}{number}" for block in blocks for number in ("", "#1"))
        for attn in ("self_attn", "cross_attn")
    )
    return Case("stable_audio3", model, draw, sites, rejected, layers, "uncond_first", SOUND)


def ace_step(*, layers: int = 3, seed: int = 0) -> Case:
    """ACE-Step: grouped heads; every other layer sees a band only, by a mask [1, 1, N, N] made in the graph."""
    from diffusers import AceStepTransformer1DModel

    model = build(
        AceStepTransformer1DModel,
        seed=seed,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        in_channels=24,
        audio_acoustic_hidden_dim=8,
        sliding_window=9,
        encoder_hidden_size=20,
    )

    def draw(by: Draw) -> Call:
        time = each(by, by.timestep / 1000).clone()
        return (), {
            "hidden_states": by.latents(2 * SOUND, 8),
            "timestep": time,
            "timestep_r": time,
            "encoder_hidden_states": words(by, TEXT, 20),
            "context_latents": by.latents(2 * SOUND, 16),
            "attention_kwargs": None,
            "return_dict": False,
        }

    sites, rejected = (paths(("layers", layers), attn=attn) for attn in ("self_attn", "cross_attn"))
    return Case("ace_step", model, draw, sites, rejected, layers, "cond_first", SOUND)


def longcat_audio(*, layers: int = 2, seed: int = 0) -> Case:
    """LongCat-AudioDiT: padded sounds and padded text, whose mean is part of every shift; CFG takes two calls."""
    from diffusers import LongCatAudioDiTTransformer

    model = build(
        LongCatAudioDiTTransformer,
        seed=seed,
        dit_dim=48,
        dit_depth=layers,
        dit_heads=4,
        dit_text_dim=20,
        latent_dim=8,
        ff_mult=2.0,
    )

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(SOUND, 8),
            "encoder_hidden_states": words(by, TEXT, 20),
            "encoder_attention_mask": by.key_mask(TEXT),
            "timestep": each(by, by.timestep / 1000),
            "attention_mask": torch.arange(SOUND) < SOUND - 9 * (torch.arange(by.batch)[:, None] % 2),
            "latent_cond": torch.zeros(by.batch, SOUND, 8),
            "return_dict": False,
        }

    sites, rejected = (paths(("blocks", layers), attn=attn) for attn in ("self_attn", "cross_attn"))
    return Case("longcat_audio", model, draw, sites, rejected, layers, None, SOUND, batch=2)


def kandinsky6(*, layers: int = 2, seed: int = 0) -> Case:
    """Kandinsky 6: channels last; video and sound in streams of their own, which read each other; two calls a step."""
    from diffusers import Kandinsky6Transformer3DModel

    model = build(
        Kandinsky6Transformer3DModel,
        seed=seed,
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=20,
        time_dim=16,
        model_dim=48,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=layers,
        axes_dims=(4, 6, 6),
        in_audio_dim=6,
        out_audio_dim=6,
        model_dim_a=32,
        time_dim_a=16,
        ff_dim_a=48,
        axes_dims_a=(4, 6, 6),
    )
    places = (torch.arange(FRAMES), torch.arange(HEIGHT // 2), torch.arange(WIDTH // 2))

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(FRAMES, HEIGHT, WIDTH, 9),
            "audio_hidden_states": by.latents(10, 6),
            "encoder_hidden_states": words(by, TEXT, 24),
            "pooled_projections": words(by, 20, loud=1.0),
            "timestep": each(by, float(by.timestep)),
            "visual_rope_pos": places,
            "encoder_attention_mask": by.key_mask(TEXT),
            "visual_token_type_ids": None,
            "return_dict": False,
        }

    blocks = [f"visual_transformer_blocks.{layer}" for layer in range(layers)]
    sites = tuple(f"{block}.{kind}_dec_block.self_attention" for block in blocks for kind in ("video", "audio"))
    texts = tuple(f"{kind}_text_transformer_blocks.0.attn" for kind in ("video", "audio"))
    across = ("video_dec_block.cross_attention", "audio_dec_block.cross_attention")
    between = ("va_cross_attention", "av_cross_attention")
    rejected = texts + tuple(f"{block}.{attn}" for block in blocks for attn in across + between)
    return Case("kandinsky6", model, draw, sites, rejected, 2 * layers, None, TOKENS, batch=2)


def sana_video(*, layers: int = 2, seed: int = 0) -> Case:
    """SANA-Video: linear self-attention with rotary tables; captions are padded."""
    from diffusers import SanaVideoTransformer3DModel

    model = build(
        SanaVideoTransformer3DModel,
        seed=seed,
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=layers,
        num_cross_attention_heads=3,
        cross_attention_head_dim=16,
        cross_attention_dim=48,
        caption_channels=20,
        sample_size=8,
        rope_max_seq_len=32,
    )

    def draw(by: Draw) -> Call:
        return (by.latents(4, FRAMES, HEIGHT, WIDTH),), {
            "encoder_hidden_states": words(by, TEXT, 20),
            "encoder_attention_mask": by.key_mask(TEXT).long(),
            "timestep": each(by, float(by.timestep)),
            "return_dict": False,
            "attention_kwargs": None,
        }

    rejected = tuple(f"transformer_blocks.{layer}.{attn}" for layer in range(layers) for attn in ("attn1", "attn2"))
    return Case("sana_video", model, draw, (), rejected, layers, "uncond_first", TOKENS)


def anyflow(*, layers: int = 3, seed: int = 0) -> Case:
    """AnyFlow: frames before channels, and two times for every frame: where it is, and where the step leads."""
    from diffusers import AnyFlowTransformer3DModel

    model = build(
        AnyFlowTransformer3DModel,
        seed=seed,
        num_layers=layers,
        in_channels=4,
        **WAN,
    )

    def draw(by: Draw) -> Call:
        times = torch.full((by.batch, FRAMES), float(by.timestep))
        return (), {
            "hidden_states": by.latents(FRAMES, 4, HEIGHT, WIDTH),
            "timestep": times,
            "r_timestep": (times - 100).clamp(0),
            "encoder_hidden_states": words(by, TEXT, 20),
            "attention_kwargs": None,
            "return_dict": False,
        }

    sites, rejected = (paths(("blocks", layers), attn=attn) for attn in ("attn1", "attn2"))
    return Case("anyflow", model, draw, sites, rejected, layers, "uncond_first", TOKENS)


def helios(*, layers: int = 2, seed: int = 0) -> Case:
    """Helios: the past, in coarser and coarser patches, stands before the latents, at a time of its own.

    Only the latents read the text.  CFG takes two calls.
    """
    from diffusers import HeliosTransformer3DModel

    model = build(
        HeliosTransformer3DModel,
        seed=seed,
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=20,
        freq_dim=32,
        ffn_dim=96,
        num_layers=layers,
        rope_dim=(4, 6, 6),
        is_amplify_history=True,
    )
    far, middle, prefix, last, now = torch.arange(4 + 2 + 1 + 1 + FRAMES).split([4, 2, 1, 1, FRAMES])

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(4, FRAMES, HEIGHT, WIDTH),
            "timestep": each(by, int(by.timestep)),
            "encoder_hidden_states": words(by, TEXT, 20),
            "indices_hidden_states": now[None],
            "indices_latents_history_short": torch.cat([prefix, last])[None],
            "indices_latents_history_mid": middle[None],
            "indices_latents_history_long": far[None],
            "latents_history_short": by.latents(4, 2, HEIGHT, WIDTH),
            "latents_history_mid": by.latents(4, 2, HEIGHT, WIDTH),
            "latents_history_long": by.latents(4, 4, HEIGHT, WIDTH),
            "attention_kwargs": None,
            "return_dict": False,
        }

    sites, rejected = (paths(("blocks", layers), attn=attn) for attn in ("attn1", "attn2"))
    return Case("helios", model, draw, sites, rejected, layers, None, TOKENS, batch=2)


def motif_video(*, doubles: int = 2, singles: int = 3, seed: int = 0) -> Case:
    """Motif-Video: text last; what attention yields reads the text once more.

    The last block decodes from a copy of the latents: what the others made of them takes the text's place.
    """
    from diffusers import MotifVideoTransformer3DModel

    model = build(
        MotifVideoTransformer3DModel,
        seed=seed,
        in_channels=9,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=doubles,
        num_single_layers=singles,
        num_decoder_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=24,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(9, FRAMES, HEIGHT, WIDTH),
            "timestep": each(by, float(by.timestep)),
            "attention_kwargs": None,
            "return_dict": False,
            "encoder_hidden_states": words(by, TEXT, 24),
            "encoder_attention_mask": by.key_mask(TEXT),
        }

    sites = paths(("transformer_blocks", doubles), ("single_transformer_blocks", singles))
    rejected = paths(("transformer_blocks", doubles), ("single_transformer_blocks", singles - 1), attn="cross_attn")
    return Case("motif_video", model, draw, sites, rejected, doubles + singles, None, 2 * TOKENS, batch=2)


TEXT_TOKENS: Final[Mapping[str, tuple[int, str]]] = {
    "stable_audio3": (MEMORY, "first"),
    "helios": (PAST, "first"),
    "motif_video": (TEXT, "last"),
}
"""As :data:`zoo_video.TEXT_TOKENS`."""

VIDEO_ONLY: Final = {"motif_video": ("single_transformer_blocks.2.attn",)}
"""Name of a case in :data:`TEXT_TOKENS` to those of its sites that have no text."""

ZOO_RECENT_AUDIO: Final[Mapping[str, Callable[[], Case]]] = {
    "stable_audio3": stable_audio3,
    "ace_step": ace_step,
    "longcat_audio": longcat_audio,
    "kandinsky6": kandinsky6,
    "sana_video": sana_video,
    "anyflow": anyflow,
    "helios": helios,
    "motif_video": motif_video,
}
"""Name to builder, as :data:`models.CASES`."""
