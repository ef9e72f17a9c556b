"""More video denoisers of diffusers, later ones mostly: tiny, random weights, called as their pipelines do.

See :mod:`zoo_video`, whose sizes and letters these have, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Final

import torch
from models import Call, Case, Draw
from zoo_joint import TEXT, build, each, paths, words
from zoo_video import FRAMES, HEIGHT, TOKENS, WIDTH
from zoo_wan import frames_times


def ltx2(*, layers: int = 2, seed: int = 0) -> Case:
    """LTX-2: a stream of video and a shorter one of sound, each with self-attention; they read each other across."""
    from diffusers import LTX2VideoTransformer3DModel

    model = build(
        LTX2VideoTransformer3DModel,
        seed=seed,
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=16,
        cross_attention_dim=64,
        audio_in_channels=6,
        audio_out_channels=6,
        audio_num_attention_heads=4,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=32,
        num_layers=layers,
        caption_channels=20,
        rope_double_precision=False,
        rope_type="split",
    )
    sound = 10

    def draw(by: Draw) -> Call:
        time = each(by, float(by.timestep))
        mask = by.key_mask(TEXT).long()
        return (), {
            "hidden_states": by.latents(TOKENS, 8),
            "audio_hidden_states": by.latents(sound, 6),
            "encoder_hidden_states": words(by, TEXT, 20),
            "audio_encoder_hidden_states": words(by, TEXT, 20),
            "timestep": time,
            "sigma": time,
            "encoder_attention_mask": mask,
            "audio_encoder_attention_mask": mask,
            "num_frames": FRAMES,
            "height": HEIGHT // 2,
            "width": WIDTH // 2,
            "fps": 24.0,
            "audio_num_frames": sound,
            "video_coords": model.rope.prepare_video_coords(by.batch, FRAMES, HEIGHT // 2, WIDTH // 2, "cpu", fps=24.0),
            "audio_coords": model.audio_rope.prepare_audio_coords(by.batch, sound, "cpu"),
            "isolate_modalities": False,
            "spatio_temporal_guidance_blocks": None,
            "perturbation_mask": None,
            "use_cross_timestep": True,
            "attention_kwargs": None,
            "return_dict": False,
        }

    blocks = [f"transformer_blocks.{layer}" for layer in range(layers)]
    sites = tuple(f"{block}.{attn}" for block in blocks for attn in ("attn1", "audio_attn1"))
    across = ("attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
    rejected = tuple(f"{block}.{attn}" for block in blocks for attn in across)
    return Case("ltx2", model, draw, sites, rejected, 2 * layers, "uncond_first", TOKENS)


def cosmos(*, given: bool = False, layers: int = 3, seed: int = 0) -> Case:
    """Cosmos: a learned position for every block.  With ``given``, Predict 2: a first frame, and a time a frame.

    The timesteps then are [B, 1, T, 1, 1].  CFG takes two calls.  The channel that marks padding needs torchvision and
    is left out.
    """
    from diffusers import CosmosTransformer3DModel

    model = build(
        CosmosTransformer3DModel,
        seed=seed,
        in_channels=4 + given,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=layers,
        mlp_ratio=2.0,
        text_embed_dim=20,
        adaln_lora_dim=8,
        max_size=(FRAMES + 1, HEIGHT, WIDTH),
        concat_padding_mask=False,
        extra_pos_embed_type=None if given else "learnable",
    )

    def draw(by: Draw) -> Call:
        call = {
            "hidden_states": by.latents(4, FRAMES, HEIGHT, WIDTH),
            "timestep": each(by, by.timestep / 1000),
            "encoder_hidden_states": words(by, TEXT, 20),
            "fps": 16,
            "padding_mask": None,
            "return_dict": False,
        }
        if given:
            times = frames_times(by, first=0.1) / 1000
            mask = torch.zeros(by.batch, 1, FRAMES, HEIGHT, WIDTH)
            mask[:, :, 0] = 1
            call |= {"timestep": times[:, None, :, None, None], "condition_mask": mask}
        return (), call

    sites, rejected = (paths(("transformer_blocks", layers), attn=attn) for attn in ("attn1", "attn2"))
    return Case("cosmos2" if given else "cosmos", model, draw, sites, rejected, layers, None, TOKENS, batch=2)


def consisid(*, layers: int = 4, seed: int = 0) -> Case:
    """ConsisID: CogVideoX whose video reads a face in every other block, by cross-attention outside of the blocks."""
    from diffusers import ConsisIDTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.consisid.pipeline_consisid import get_resize_crop_region_for_grid

    model = build(
        ConsisIDTransformer3DModel,
        seed=seed,
        gain=2.5,
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        time_embed_dim=32,
        text_embed_dim=24,
        num_layers=layers,
        sample_width=WIDTH,
        sample_height=HEIGHT,
        sample_frames=4 * (FRAMES - 1) + 1,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_dim_head=16,
        cross_attn_num_heads=2,
        LFE_id_dim=20,
        LFE_vit_dim=16,
        LFE_depth=2,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_querie=4,
        LFE_num_id_token=2,
        LFE_output_dim=32,
        LFE_ff_mult=1,
        LFE_num_scale=2,
    )
    grid = (HEIGHT // 2, WIDTH // 2)
    crop = get_resize_crop_region_for_grid(grid, WIDTH // 2, HEIGHT // 2)
    tables = get_3d_rotary_pos_embed(16, crop, grid, FRAMES)

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(FRAMES, 8, HEIGHT, WIDTH),
            "encoder_hidden_states": words(by, TEXT, 24),
            "timestep": each(by, int(by.timestep)),
            "image_rotary_emb": tables,
            "attention_kwargs": None,
            "return_dict": False,
            "id_vit_hidden": [by.latents(9, 16) for _ in range(2)],
            "id_cond": by.latents(20),
        }

    sites = paths(("transformer_blocks", layers), attn="attn1")
    faces = tuple(f"local_facial_extractor.layers.{layer}.0" for layer in range(2))
    readers = tuple(f"perceiver_cross_attention.{layer}" for layer in range(layers // 2))
    return Case("consisid", model, draw, sites, faces + readers, layers, "uncond_first", TOKENS)


def easyanimate(*, joint: int = 2, layers: int = 3, seed: int = 0) -> Case:
    """EasyAnimate: text first; later blocks share their projections, and rotary tables are written into slices."""
    from diffusers import EasyAnimateTransformer3DModel

    model = build(
        EasyAnimateTransformer3DModel,
        seed=seed,
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=WIDTH,
        sample_height=HEIGHT,
        num_layers=layers,
        mmdit_layers=joint,
        time_embed_dim=32,
        add_norm_text_encoder=True,
        text_embed_dim=24,
    )

    def draw(by: Draw) -> Call:
        return (by.latents(4, FRAMES, HEIGHT, WIDTH), torch.tensor([by.timestep] * by.batch)), {
            "encoder_hidden_states": words(by, TEXT, 24),
            "return_dict": False,
        }

    sites = paths(("transformer_blocks", layers), attn="attn1")
    return Case("easyanimate", model, draw, sites, (), layers, "uncond_first", TOKENS)


TEXT_TOKENS: Final[Mapping[str, tuple[int, str]]] = {
    "consisid": (TEXT, "first"),
    "easyanimate": (TEXT, "first"),
}
"""As :data:`zoo_video.TEXT_TOKENS`."""

ZOO_RECENT_VIDEO: Final[Mapping[str, Callable[[], Case]]] = {
    "ltx2": ltx2,
    "cosmos": cosmos,
    "cosmos2": functools.partial(cosmos, given=True),
    "consisid": consisid,
    "easyanimate": easyanimate,
}
"""Name to builder, as :data:`models.CASES`."""
