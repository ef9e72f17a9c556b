"""Pipelines of diffusers with random weights, which need no network: tiny, or of the published sizes.

A tiny one runs a whole experiment in a minute on a CPU. One of the published size draws noise, but takes the time
that the trained model takes. The denoiser and its scheduler are of the published kind; the autoencoder and the text
encoder are always small.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from torch import nn

_BETAS = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
_XL = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28}
_TINY = {"num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 2}
_SHAPE = {"in_channels": 4, "out_channels": 8, "patch_size": 2}


def dit(*, tiny: bool, seed: int = 0) -> DiTPipeline:
    """``DiTPipeline`` as in DiT-XL/2-512, or with 64 tokens."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        sizes = _TINY | {"sample_size": 16} if tiny else _XL | {"sample_size": 64}
        denoiser = DiTTransformer2DModel(**_SHAPE, **sizes, num_embeds_ada_norm=1000)
        vae = autoencoder()
    return DiTPipeline(transformer=wake(denoiser, seed), vae=vae, scheduler=DDIMScheduler(**_BETAS, clip_sample=False))


def pixart_sigma(*, tiny: bool, sample_size: int = 128, seed: int = 0) -> PixArtSigmaPipeline:
    """``PixArtSigmaPipeline`` as in PixArt-Sigma, or with 64 tokens.

    Args:
        tiny: two narrow layers.
        sample_size: side of the latents of the published size: 128 for 1 024 pixels, 256 for 2 048.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        sizes = _TINY | {"sample_size": 16} if tiny else _XL | {"sample_size": sample_size}
        width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
        denoiser = PixArtTransformer2DModel(
            **_SHAPE,
            **sizes,
            cross_attention_dim=width,
            caption_channels=_captions(tiny),
            use_additional_conditions=False,
        )
        parts = {"vae": autoencoder(), **_text(_captions(tiny))}
    scheduler = DPMSolverMultistepScheduler(**_BETAS)
    return PixArtSigmaPipeline(transformer=wake(denoiser, seed), scheduler=scheduler, **parts)


def latte(*, tiny: bool, seed: int = 0) -> LattePipeline:
    """``LattePipeline`` as in Latte-1, or with 5 frames of 36 tokens."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        sizes = _TINY | {"sample_size": 12, "video_length": 5} if tiny else _XL | {"sample_size": 64}
        denoiser = LatteTransformer3DModel(
            **_SHAPE,
            **sizes,
            cross_attention_dim=sizes["num_attention_heads"] * sizes["attention_head_dim"],
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=_captions(tiny),
        )
        parts = {"vae": autoencoder(), **_text(_captions(tiny))}
    scheduler = DDIMScheduler(**_BETAS, clip_sample=False)
    return LattePipeline(transformer=wake(denoiser, seed), scheduler=scheduler, **parts)


def autoencoder() -> AutoencoderKL:
    """A small autoencoder whose latents are an eighth of the image to either side."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        force_upcast=False,
    ).eval()


def wake(model: nn.Module, seed: int = 0, size: float = 0.2) -> Any:
    """``model`` with noise on every constant parameter: a fresh gate is zero and hides its attention."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.min() == parameter.max():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _captions(tiny: bool) -> int:
    return 16 if tiny else 4096


def _text(channels: int) -> dict[str, Any]:
    """A T5 of one layer and the tokenizer of its kind that needs no vocabulary."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=384,
        d_model=channels,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return {"tokenizer": ByT5Tokenizer(), "text_encoder": T5EncoderModel(config).eval()}
