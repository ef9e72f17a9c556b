"""U-Nets and a U-ViT: attention between convolutions, tiny, with random weights.

See :mod:`zoo_recent_images`; ``tokens`` of a case counts those of its first site.

Letters: B batch, N image tokens, L text tokens.
"""

from __future__ import annotations

import torch
from models import Call, Case, Draw
from zoo_joint import TEXT, build, each, words


def sdxl(*, seed: int = 0) -> Case:
    """Stable Diffusion XL's U-Net: two blocks between one pair of projections, pooled text and sizes as conditions."""
    from diffusers import UNet2DConditionModel

    model = build(
        UNet2DConditionModel,
        seed=seed,
        sample_size=12,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )
    sizes = torch.tensor([[96.0, 96, 0, 0, 96, 96]])

    def draw(by: Draw) -> Call:
        return (by.latents(4, 16, 16), torch.tensor(int(by.timestep))), {
            "encoder_hidden_states": words(by, TEXT, 24),
            "timestep_cond": None,
            "cross_attention_kwargs": None,
            "added_cond_kwargs": {"text_embeds": words(by, 20, loud=1.0), "time_ids": sizes.repeat(by.batch, 1)},
            "return_dict": False,
        }

    places = ("down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.0")
    blocks = [f"{p}.transformer_blocks.{i}" for p in (*places, "up_blocks.0.attentions.1") for i in range(2)]
    sites, rejected = (tuple(f"{block}.{attn}" for block in blocks) for attn in ("attn1", "attn2"))
    return Case("sdxl", model, draw, sites, rejected, len(blocks), "uncond_first", 64)


def ddpm_unet(*, seed: int = 0) -> Case:
    """The U-Net of DDPM and its kin: a group norm, a residual and a factor inside each attention; no condition."""
    from diffusers import UNet2DModel

    model = build(
        UNet2DModel,
        seed=seed,
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        mid_block_scale_factor=2**0.5,
    )

    def draw(by: Draw) -> Call:
        return (by.latents(3, 16, 16), torch.tensor(int(by.timestep))), {"return_dict": False}

    places = ("down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.0")
    sites = tuple(f"{place}.attentions.{number}" for place, number in zip(places, (0, 0, 0, 1), strict=True))
    return Case("ddpm_unet", model, draw, sites, (), len(sites), None, 64, batch=2)


def kandinsky3(*, seed: int = 0) -> Case:
    """Kandinsky 3's U-Net: self- and cross-attention in blocks of their own, around modulated group norms."""
    from diffusers import Kandinsky3UNet

    model = build(
        Kandinsky3UNet,
        seed=seed,
        time_embedding_dim=32,
        groups=8,
        attention_head_dim=16,
        layers_per_block=2,
        block_out_channels=(32, 32, 32, 64),
        cross_attention_dim=24,
        encoder_hid_dim=20,
    )

    def draw(by: Draw) -> Call:
        return (by.latents(4, 16, 16), torch.tensor(int(by.timestep))), {
            "encoder_hidden_states": words(by, TEXT, 20),
            "encoder_attention_mask": by.key_mask(TEXT).long(),
            "return_dict": False,
        }

    downs, ups = [f"down_blocks.{i}.attentions" for i in (1, 2, 3)], [f"up_blocks.{i}.attentions" for i in range(3)]
    sites = tuple(f"{place}.0.attention" for place in (*downs, *ups))
    crosses = [f"{place}.{number}.attention" for place in (*downs, *ups) for number in (1, 2)]
    rejected = ("add_time_condition.attention", *crosses)
    return Case("kandinsky3", model, draw, sites, rejected, len(sites), "uncond_first", 64)


def dreamlite(*, seed: int = 0) -> Case:
    """DreamLite's U-Net: all heads share one key and value; a given image is beside the noisy one, both in one."""
    from diffusers.models import DreamLiteUNetModel

    model = build(
        DreamLiteUNetModel,
        seed=seed,
        sample_size=8,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=(2, 4),
        ff_mult=2,
        addition_embed_type="time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=2 * 8,
    )

    def draw(by: Draw) -> Call:
        given = torch.zeros(by.batch, 4, 8, 16)
        return (torch.cat([by.latents(4, 8, 16), given], dim=3),), {
            "timestep": each(by, float(by.timestep)),
            "encoder_hidden_states": words(by, TEXT, 24),
            "encoder_attention_mask": by.key_mask(TEXT).long(),
            "added_cond_kwargs": {"time_ids": torch.tensor([[128.0, 128.0]]).repeat(by.batch, 1)},
            "return_dict": False,
        }

    places = ("down_blocks.1.attentions.0", "mid_block.attentions.0")
    places = (*places, "up_blocks.0.attentions.0", "up_blocks.0.attentions.1")
    sites = tuple(f"{place}.transformer_blocks.0.attn1" for place in places)
    crosses = ("down_blocks.0.attentions.0", *places)
    rejected = tuple(f"{place}.transformer_blocks.0.attn2" for place in crosses)
    return Case("dreamlite", model, draw, sites, rejected, len(sites), "uncond_first", 64)


def amused(*, layers: int = 2, seed: int = 0) -> Case:
    """The U-ViT of aMUSEd: the image is tokens of a codebook, int64 [B, H, W], and no timestep is shown.

    Between the convolutions all attention is to the text.
    """
    from diffusers import UVit2DModel

    model = build(
        UVit2DModel,
        seed=seed,
        hidden_size=48,
        cond_embed_dim=20,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        encoder_hidden_size=24,
        vocab_size=33,
        codebook_size=32,
        in_channels=32,
        block_out_channels=32,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=64,
        sample_size=8,
    )
    micro = torch.tensor([[128.0, 128, 0, 0, 6]])

    def draw(by: Draw) -> Call:
        half = torch.randint(33, (by.batch // 2, 8, 8), generator=by.generator)
        return (torch.cat([half, half]),), {
            "micro_conds": micro.repeat(by.batch, 1),
            "pooled_text_emb": words(by, 20, loud=1.0),
            "encoder_hidden_states": words(by, TEXT, 24),
            "cross_attention_kwargs": None,
        }

    down, up = (f"{block}.attention_blocks.0" for block in ("down_block", "up_block"))
    inner = [f"transformer_layers.{layer}" for layer in range(layers)]
    sites = tuple(f"{layer}.attn1" for layer in inner)
    crosses = (f"{layer}.attn2" for layer in inner)
    rejected = (f"{down}.attn1", f"{down}.attn2", *crosses, f"{up}.attn1", f"{up}.attn2")
    return Case("amused", model, draw, sites, rejected, len(sites), "uncond_first", 64)
