"""Recent image denoisers whose text joins the image in ways that the others do not: tiny, random weights.

See :mod:`zoo_recent_images`.

Letters: B batch, N image tokens, L text tokens.
"""

from __future__ import annotations

import torch
from models import Call, Case, Draw
from zoo_joint import TEXT, build, each, grid_ids, paths, words


def prx(*, layers: int = 3, seed: int = 0) -> Case:
    """PRX: the image asks text and image, and text asks nothing, so that no window is possible; padded text first."""
    from diffusers.models import PRXTransformer2DModel

    model = build(
        PRXTransformer2DModel,
        seed=seed,
        in_channels=4,
        patch_size=2,
        context_in_dim=24,
        hidden_size=48,
        mlp_ratio=2.0,
        num_heads=3,
        depth=layers,
        axes_dim=[8, 8],
    )

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(4, 16, 16),
            "timestep": torch.tensor(by.timestep / 1000).view(1).repeat(2),
            "encoder_hidden_states": words(by, TEXT, 24),
            "attention_mask": by.key_mask(TEXT),
            "return_dict": False,
        }

    sites = paths(("blocks", layers), attn="attention")
    return Case("prx", model, draw, sites, (), layers, "uncond_first", 64, batch=2)


def krea2(*, layers: int = 3, fusion: int = 1, seed: int = 0) -> Case:
    """Krea 2: padded text first, grouped heads, a gate [B, L + N, D] before the output projection; two calls for CFG.

    Blocks of the text alone attend among the layers of its encoder, token by token, and then among tokens.
    """
    from diffusers.models import Krea2Transformer2DModel

    depth = 3
    model = build(
        Krea2Transformer2DModel,
        seed=seed,
        in_channels=16,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        timestep_embed_dim=32,
        text_hidden_dim=24,
        num_text_layers=depth,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=48,
        num_layerwise_text_blocks=fusion,
        num_refiner_text_blocks=fusion,
        axes_dims_rope=(4, 6, 6),
    )

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(64, 16),
            "encoder_hidden_states": words(by, TEXT, depth, 24),
            "timestep": each(by, by.timestep / 1000),
            "position_ids": torch.cat([torch.zeros(TEXT, 3), grid_ids(8, 8)]),
            "encoder_attention_mask": by.key_mask(TEXT),
            "attention_kwargs": None,
            "return_dict": False,
        }

    rejected = paths(("text_fusion.layerwise_blocks", fusion), ("text_fusion.refiner_blocks", fusion))
    return Case("krea2", model, draw, paths(("transformer_blocks", layers)), rejected, layers, None, 64, batch=2)


def glm_image(*, layers: int = 3, seed: int = 0) -> Case:
    """GLM-Image: as CogView 4, and a token of a codebook for each of the image's, zeroed by a mask; two calls for CFG.

    A cache for keys and values of images that are given comes along, and stays empty without any.
    """
    from diffusers.models import GlmImageTransformer2DModel
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    model = build(
        GlmImageTransformer2DModel,
        seed=seed,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=3,
        text_embed_dim=24,
        time_embed_dim=32,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=32,
    )

    def draw(by: Draw) -> Call:
        prior = torch.randint(32, (by.batch, 64), generator=by.generator)
        return (), {
            "hidden_states": by.latents(4, 16, 16),
            "encoder_hidden_states": words(by, TEXT, 24),
            "prior_token_id": prior,
            "prior_token_drop": torch.full_like(prior, fill_value=False, dtype=torch.bool),
            "timestep": each(by, float(by.timestep)) - 1,
            "target_size": torch.tensor([[128.0, 128.0]]).repeat(by.batch, 1),
            "crop_coords": torch.zeros(by.batch, 2),
            "attention_kwargs": {},
            "return_dict": False,
            "kv_caches": GlmImageKVCache(num_layers=layers),
        }

    sites = paths(("transformer_blocks", layers), attn="attn1")
    return Case("glm_image", model, draw, sites, (), layers, None, 64, batch=2)


def ernie_image(*, layers: int = 3, seed: int = 0) -> Case:
    """ERNIE-Image: tokens before the batch, [N + L, B, D], between the blocks' attentions; padded text last."""
    from diffusers.models import ErnieImageTransformer2DModel

    model = build(
        ErnieImageTransformer2DModel,
        seed=seed,
        hidden_size=48,
        num_attention_heads=3,
        num_layers=layers,
        ffn_hidden_size=96,
        in_channels=16,
        out_channels=16,
        text_in_dim=24,
        rope_axes_dim=(4, 6, 6),
    )

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(16, 8, 8),
            "timestep": torch.full((by.batch,), float(by.timestep)),
            "text_bth": words(by, TEXT, 24),
            "text_lens": by.key_mask(TEXT).sum(1),
            "return_dict": False,
        }

    sites = paths(("layers", layers), attn="self_attention")
    return Case("ernie_image", model, draw, sites, (), layers, "uncond_first", 64)


def ideogram4(*, layers: int = 3, seed: int = 0) -> Case:
    """Ideogram 4: the latents come as one sequence with places for text before them, which is added to zeros there.

    So the sites are self-attention of all L + N tokens. A mask [B, 1, L + N, L + N] parts padding; CFG has a
    denoiser of its own without text.
    """
    from diffusers.models import Ideogram4Transformer2DModel

    model = build(
        Ideogram4Transformer2DModel,
        seed=seed,
        in_channels=16,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=3,
        intermediate_size=96,
        adaln_dim=32,
        llm_features_dim=24,
        rope_theta=10_000,
        mrope_section=(3, 2, 2),
    )
    tokens = TEXT + 64
    place = torch.arange(tokens)
    grid = torch.cartesian_prod(torch.arange(1), torch.arange(8), torch.arange(8)) + 65536

    def draw(by: Draw) -> Call:
        padding = TEXT - by.key_mask(TEXT).sum(1, keepdim=True)
        real = place >= padding
        text = (place[:TEXT] - padding).clamp(min=0)[..., None].expand(-1, -1, 3)
        features = words(by, TEXT, 24)
        return (), {
            "hidden_states": torch.cat([torch.zeros(by.batch, TEXT, 16), by.latents(64, 16)], dim=1),
            "timestep": each(by, 1 - by.timestep / 1000),
            "encoder_hidden_states": torch.cat([features, torch.zeros(by.batch, 64, 24)], dim=1),
            "position_ids": torch.cat([text, grid.expand(by.batch, -1, -1)], dim=1),
            "segment_ids": torch.where(real, 1, -1),
            "indicator": torch.where(real, torch.where(place < TEXT, 3, 2), 0),
            "attention_kwargs": None,
            "return_dict": False,
        }

    sites = paths(("layers", layers), attn="attention")
    return Case("ideogram4", model, draw, sites, (), layers, None, tokens, batch=2)


def joy_image(*, layers: int = 3, seed: int = 0) -> Case:
    """JoyImage-Edit: a given image and the noisy one in six axes, one sequence; text last; two calls for CFG."""
    from diffusers.models import JoyImageEditTransformer3DModel

    model = build(
        JoyImageEditTransformer3DModel,
        seed=seed,
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=48,
        num_attention_heads=3,
        text_dim=24,
        num_layers=layers,
        rope_dim_list=[4, 6, 6],
    )

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(2, 4, 1, 8, 16),
            "timestep": each(by, float(by.timestep)).clone(),
            "encoder_hidden_states": words(by, TEXT, 24),
            "return_dict": False,
        }

    return Case("joy_image", model, draw, paths(("double_blocks", layers)), (), layers, None, 64, batch=2)


def ovis_image(*, doubles: int = 2, singles: int = 2, seed: int = 0) -> Case:
    """Ovis-Image: FLUX's blocks with gated MLPs and nothing but the timestep to modulate them; two calls for CFG."""
    from diffusers.models import OvisImageTransformer2DModel

    model = build(
        OvisImageTransformer2DModel,
        seed=seed,
        in_channels=16,
        out_channels=16,
        num_layers=doubles,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    text = torch.zeros(TEXT, 3)
    text[:, 1:] = torch.arange(TEXT)[:, None]

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(64, 16),
            "timestep": each(by, float(by.timestep)) / 1000,
            "encoder_hidden_states": words(by, TEXT, 24),
            "txt_ids": text,
            "img_ids": grid_ids(8, 8),
            "joint_attention_kwargs": {},
            "return_dict": False,
        }

    sites = paths(("transformer_blocks", doubles), ("single_transformer_blocks", singles))
    return Case("ovis_image", model, draw, sites, (), doubles + singles, None, 64, batch=2)


def flux3(*, modes: int = 1, singles: int = 2, given: int = 0, seed: int = 0) -> Case:
    """FLUX.3: image and text have blocks of their own before they join; both join behind norm and modulation.

    Args:
        modes: blocks of each alone.
        singles: blocks of both.
        given: tokens of given images, last, which stand at timestep 0 as the text does.
        seed: of the weights.
    """
    from diffusers.models import Flux3Transformer2DModel

    model = build(
        Flux3Transformer2DModel,
        seed=seed,
        in_channels=16,
        cond_in_channels=16,
        num_layers=modes,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=24,
        timestep_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    one = torch.arange(1)
    beside = torch.cartesian_prod(one + 1, one, torch.arange(given), one).float()

    def draw(by: Draw) -> Call:
        images = {"image_cond_hidden_states": words(by, given, 16, loud=1.0), "image_cond_ids": beside} if given else {}
        return (), {
            "hidden_states": by.latents(64, 16),
            "timestep": each(by, by.timestep / 1000),
            "return_dict": False,
            "img_ids": torch.cartesian_prod(one, torch.arange(8), torch.arange(8), one).float(),
            "encoder_hidden_states": words(by, TEXT, 24),
            "txt_ids": torch.cartesian_prod(one, one, one, torch.arange(TEXT)).float(),
            **images,
        }

    sites = paths(("mode_blocks.image", modes), ("single_transformer_blocks", singles))
    beside_image = (("mode_blocks.image_cond", modes),) if given else ()
    rejected = paths(("txt_mode_blocks", modes), *beside_image)
    return Case("flux3", model, draw, sites, rejected, modes + singles, None, 64, batch=2)
