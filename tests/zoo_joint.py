"""Real image denoisers with a stream each for text and image, joined in attention: tiny, random weights.

Each is called as its pipeline calls it. ``tokens`` of such a :class:`~models.Case` counts the image's
tokens alone; :data:`zoo_images.TEXT_TOKENS` says how many others stand before or behind them.

Letters: B batch, N image tokens, L text tokens.
"""

from __future__ import annotations

import warnings
from typing import Any, Final

import torch
from models import Call, Case, Draw, wake
from torch import Tensor, nn

TEXT: Final = 14
"""L, of each of these denoisers."""


def build(kind: type[nn.Module], *, seed: int, gain: float = 3**0.5, **config: Any) -> nn.Module:
    """A denoiser of that class with seeded weights, woken and in eval mode.

    A fresh linear layer lets a third of the variance through: after a few of them attention is flat
    and a prompt goes unheard. ``gain`` multiplies their weights; by default all of it passes.
    """
    with torch.random.fork_rng(devices=()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' own, of a class that Chroma still uses
        torch.manual_seed(seed)
        model = kind(**config)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(gain)
    return wake(model, seed=seed).eval()


def words(by: Draw, *shape: int, loud: float = 3.0) -> Tensor:
    """Embeddings [B, *shape] of prompts; with CFG half of them are of the empty prompt, and quieter."""
    null = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    return by.condition(lambda rows, gen: loud * torch.randn(rows, *shape, generator=gen), null)


def each(by: Draw, value: float) -> Tensor:
    """One number for every sample, [B] by expansion, as pipelines pass timesteps."""
    return torch.tensor(value).expand(by.batch)


def grid_ids(rows: int, columns: int) -> Tensor:
    """Positions [N, 3] of image tokens: nothing, row, column."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)
    return ids.flatten(0, 1)


def paths(*groups: tuple[str, int], attn: str = "attn") -> tuple[str, ...]:
    """Paths of the attentions of lists of blocks, each given by name and length."""
    return tuple(f"{blocks}.{index}.{attn}" for blocks, layers in groups for index in range(layers))


def sd3(*, dual: int = 0, layers: int = 3, seed: int = 0) -> Case:
    """Stable Diffusion 3: text behind the image; the last block hands out no text.

    Args:
        dual: so many first blocks also have self-attention of the image alone, and all normalise q and
            k, as in Stable Diffusion 3.5.
        layers: blocks.
        seed: of the weights.
    """
    from diffusers import SD3Transformer2DModel

    model = build(
        SD3Transformer2DModel,
        seed=seed,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=24,
        caption_projection_dim=48,
        pooled_projection_dim=20,
        pos_embed_max_size=12,
        dual_attention_layers=tuple(range(dual)),
        qk_norm="rms_norm" if dual else None,
    )

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(4, 16, 16),
            "timestep": each(by, float(by.timestep)),
            "encoder_hidden_states": words(by, TEXT, 24),
            "pooled_projections": words(by, 20, loud=1.0),
            "joint_attention_kwargs": None,
            "return_dict": False,
        }

    sites = tuple(
        f"transformer_blocks.{layer}.{attn}"
        for layer in range(layers)
        for attn in (("attn", "attn2") if layer < dual else ("attn",))
    )
    return Case("sd35" if dual else "sd3", model, draw, sites, (), layers, "uncond_first", 64)


def flux(*, doubles: int = 2, singles: int = 2, seed: int = 0) -> Case:
    """FLUX.1-dev: text first, guidance as an input; single blocks have one output projection with the MLP's."""
    from diffusers import FluxTransformer2DModel

    model = build(
        FluxTransformer2DModel,
        seed=seed,
        in_channels=16,
        num_layers=doubles,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(64, 16),
            "timestep": each(by, float(by.timestep)) / 1000,
            "guidance": each(by, 3.5),
            "pooled_projections": words(by, 20, loud=1.0),
            "encoder_hidden_states": words(by, TEXT, 24),
            "txt_ids": torch.zeros(TEXT, 3),
            "img_ids": grid_ids(8, 8),
            "joint_attention_kwargs": {},
            "return_dict": False,
        }

    sites = paths(("transformer_blocks", doubles), ("single_transformer_blocks", singles))
    return Case("flux", model, draw, sites, (), doubles + singles, None, 64, batch=2)


def flux2(*, doubles: int = 2, singles: int = 2, seed: int = 0) -> Case:
    """FLUX.2: as FLUX.1, but a single block's ``attn`` holds its MLP too, all in one projection."""
    from diffusers import Flux2Transformer2DModel

    model = build(
        Flux2Transformer2DModel,
        seed=seed,
        in_channels=16,
        num_layers=doubles,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 4, 4),
    )
    one = torch.arange(1)

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(64, 16),
            "timestep": each(by, float(by.timestep)) / 1000,
            "guidance": each(by, 3.5),
            "encoder_hidden_states": words(by, TEXT, 24),
            "txt_ids": torch.cartesian_prod(one, one, one, torch.arange(TEXT)).repeat(by.batch, 1, 1),
            "img_ids": torch.cartesian_prod(one, torch.arange(8), torch.arange(8), one).expand(by.batch, -1, -1),
            "joint_attention_kwargs": None,
            "return_dict": False,
        }

    sites = paths(("transformer_blocks", doubles), ("single_transformer_blocks", singles))
    return Case("flux2", model, draw, sites, (), doubles + singles, None, 64, batch=2)


def chroma(*, doubles: int = 2, singles: int = 2, seed: int = 0) -> Case:
    """Chroma: FLUX's blocks with a mask [B, 1, L + N, L + N] for padded text; CFG takes two calls.

    The mask is 1 where both tokens are real, else 0, and float as in the pipeline: it is added to the scores.
    """
    from diffusers import ChromaTransformer2DModel

    model = build(
        ChromaTransformer2DModel,
        seed=seed,
        in_channels=16,
        num_layers=doubles,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=32,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )

    def draw(by: Draw) -> Call:
        image = torch.ones(by.batch, 64, dtype=torch.bool)
        return (), {
            "hidden_states": by.latents(64, 16),
            "timestep": each(by, float(by.timestep)) / 1000,
            "encoder_hidden_states": words(by, TEXT, 24),
            "txt_ids": torch.zeros(TEXT, 3),
            "img_ids": grid_ids(8, 8),
            "attention_mask": torch.cat([by.key_mask(TEXT).float(), image], dim=1),
            "joint_attention_kwargs": {},
            "return_dict": False,
        }

    sites = paths(("transformer_blocks", doubles), ("single_transformer_blocks", singles))
    return Case("chroma", model, draw, sites, (), doubles + singles, None, 64, batch=2)


def auraflow(*, doubles: int = 2, singles: int = 2, seed: int = 0) -> Case:
    """AuraFlow: eight register tokens and the text come first; the timestep runs from 0 to 1."""
    from diffusers import AuraFlowTransformer2DModel

    model = build(
        AuraFlowTransformer2DModel,
        seed=seed,
        gain=2.5,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=doubles,
        num_single_dit_layers=singles,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=24,
        caption_projection_dim=48,
        pos_embed_max_size=144,
    )

    def draw(by: Draw) -> Call:
        return (by.latents(4, 16, 16),), {
            "encoder_hidden_states": words(by, TEXT, 24),
            "timestep": each(by, by.timestep / 1000),
            "return_dict": False,
            "attention_kwargs": None,
        }

    sites = paths(("joint_transformer_blocks", doubles), ("single_transformer_blocks", singles))
    return Case("auraflow", model, draw, sites, (), doubles + singles, "uncond_first", 64)


def qwen_image(*, layers: int = 3, seed: int = 0) -> Case:
    """Qwen-Image: text first, complex rotary tables, a mask [B, 1, 1, L + N] for padded text; CFG takes two calls."""
    from diffusers import QwenImageTransformer2DModel

    model = build(
        QwenImageTransformer2DModel,
        seed=seed,
        in_channels=16,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )

    def draw(by: Draw) -> Call:
        return (), {
            "hidden_states": by.latents(64, 16),
            "timestep": each(by, float(by.timestep)) / 1000,
            "guidance": None,
            "encoder_hidden_states_mask": by.key_mask(TEXT).long(),
            "encoder_hidden_states": words(by, TEXT, 24),
            "img_shapes": [[(1, 8, 8)]] * by.batch,
            "attention_kwargs": {},
            "return_dict": False,
        }

    return Case("qwen_image", model, draw, paths(("transformer_blocks", layers)), (), layers, None, 64, batch=2)
