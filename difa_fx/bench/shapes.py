"""Built-in denoisers: published configurations with random weights, and how a sampler calls them.

Nothing is downloaded.  Sizes are those of the published configuration files (DiT-XL/2-512, PixArt-Sigma 1024 and 2K,
Stable Diffusion 3 medium, FLUX.1-dev, Wan 2.1 1.3B); ``--layers``, ``--batch`` and ``--tokens`` change them.

Letters: B batch, C channels, H, W latent height and width, N image tokens, L text tokens, E width of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from difa_fx.bench.settings import DTYPES, Size, choice
from difa_fx.bench.subject import Subject
from difa_fx.errors import OptionError


def make_subject(size: Size) -> Subject:
    """The built-in denoiser that ``size`` names, at that size.

    Raises:
        OptionError: there is no such denoiser, or it cannot have that size.
    """
    choice("SHAPE", size.shape, SHAPES)
    builder = SHAPES[size.shape]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if size.cuda else ()):
        torch.manual_seed(size.seed)
        return builder(size)


def _filled(size: Size, *, layers: int, batch: int, tokens: int, tiny_tokens: int = 64) -> Size:
    """``size`` with what is published where it says nothing."""
    return Size(
        shape=size.shape,
        layers=size.layers or (2 if size.tiny else layers),
        batch=size.batch or batch,
        tokens=size.tokens or (tiny_tokens if size.tiny else tokens),
        dtype=size.dtype,
        device=size.device,
        tiny=size.tiny,
        seed=size.seed,
    )


def _side(size: Size) -> int:
    """Rows (and columns) of the image's tokens."""
    assert size.tokens is not None
    side = math.isqrt(size.tokens)
    if side * side != size.tokens:
        raise OptionError(
            "the image's tokens are no square",
            where="--tokens",
            got=size.tokens,
            allowed=f"{side**2}, {(side + 1) ** 2}, ...",
            todo="give the square of a whole number",
        )
    return side


def _images(size: Size) -> int:
    """Images of a batch that holds both halves of guidance."""
    assert size.batch is not None
    if size.batch % 2:
        raise OptionError(
            "a batch of both halves of guidance is odd",
            where="--batch",
            got=size.batch,
            allowed="2, 4, 6, ...",
            todo="give twice the number of images",
        )
    return size.batch // 2


def _model(kind: Callable[..., Any], size: Size, **config: Any) -> nn.Module:
    """A denoiser of that class and configuration with random weights."""
    with torch.device(size.device):
        model: nn.Module = kind(**config)
    # Not diffusers' own `to`, which warns that it keeps no module in float32.
    return nn.Module.to(model, size.device, DTYPES[size.dtype]).eval().requires_grad_(False)


def _normal(size: Size, *shape: int) -> Tensor:
    return torch.randn(shape, device=size.device, dtype=DTYPES[size.dtype])


def _paths(blocks: str, count: int, attention: str) -> tuple[str, ...]:
    return tuple(f"{blocks}.{index}.{attention}" for index in range(count))


def _dit(size: Size) -> Subject:
    from diffusers import DiTTransformer2DModel

    size = _filled(size, layers=28, batch=2, tokens=1024)
    assert size.layers is not None and size.batch is not None
    side, images = _side(size), _images(size)
    heads, width = (2, 8) if size.tiny else (16, 72)
    model = _model(
        DiTTransformer2DModel,
        size,
        num_attention_heads=heads,
        attention_head_dim=width,
        in_channels=4,
        out_channels=8,
        num_layers=size.layers,
        sample_size=2 * side,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    labels = torch.arange(images) * 7 % 1000
    return Subject(
        size=size,
        model=model,
        sites=_paths("transformer_blocks", size.layers, "attn1"),
        noise=_normal(size, images, 4, 2 * side, 2 * side),
        conditions=({"class_labels": torch.cat([labels, torch.full((images,), 1000)]).to(size.device)},),
        cfg="cond_first",
    )


def _pixart(size: Size, *, tokens: int) -> Subject:
    from diffusers import PixArtTransformer2DModel

    size = _filled(size, layers=28, batch=2, tokens=tokens)
    assert size.layers is not None and size.batch is not None
    side, images = _side(size), _images(size)
    heads, width, text, text_width = (2, 8, 7, 12) if size.tiny else (16, 72, 300, 4096)
    model = _model(
        PixArtTransformer2DModel,
        size,
        num_attention_heads=heads,
        attention_head_dim=width,
        in_channels=4,
        out_channels=8,
        num_layers=size.layers,
        cross_attention_dim=heads * width,
        sample_size=2 * side,
        patch_size=2,
        interpolation_scale=max(2 * side // 64, 1),
        caption_channels=text_width,
        use_additional_conditions=False,
    )
    condition = {
        "encoder_hidden_states": _normal(size, size.batch, text, text_width),
        "encoder_attention_mask": torch.ones(size.batch, text, dtype=torch.int64, device=size.device),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return Subject(
        size=size,
        model=model,
        sites=_paths("transformer_blocks", size.layers, "attn1"),
        noise=_normal(size, images, 4, 2 * side, 2 * side),
        conditions=(condition,),
        cfg="uncond_first",
    )


def _pixart_1024(size: Size) -> Subject:
    return _pixart(size, tokens=4096)


def _pixart_2k(size: Size) -> Subject:
    return _pixart(size, tokens=16384)


def _sd3(size: Size) -> Subject:
    from diffusers import SD3Transformer2DModel

    size = _filled(size, layers=24, batch=2, tokens=4096)
    assert size.layers is not None and size.batch is not None
    side, images = _side(size), _images(size)
    heads, width, text, text_width, pooled = (2, 8, 7, 12, 10) if size.tiny else (24, 64, 77 + 256, 4096, 2048)
    model = _model(
        SD3Transformer2DModel,
        size,
        sample_size=2 * side,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=size.layers,
        num_attention_heads=heads,
        attention_head_dim=width,
        joint_attention_dim=text_width,
        caption_projection_dim=heads * width,
        pooled_projection_dim=pooled,
        pos_embed_max_size=max(side, 16 if size.tiny else 192),
    )
    condition = {
        "encoder_hidden_states": _normal(size, size.batch, text, text_width),
        "pooled_projections": _normal(size, size.batch, pooled),
    }
    return Subject(
        size=size,
        model=model,
        sites=_paths("transformer_blocks", size.layers, "attn"),
        noise=_normal(size, images, 16, 2 * side, 2 * side),
        conditions=(condition,),
        cfg="uncond_first",
        text=(0, text),
        integer_time=False,
    )


def _flux(size: Size) -> Subject:
    from diffusers import FluxTransformer2DModel

    size = _filled(size, layers=57, batch=1, tokens=4096)
    assert size.layers is not None and size.batch is not None
    side, doubles = _side(size), max(1, round(size.layers / 3))
    heads, width, axes, text, text_width, pooled = (
        (2, 16, (4, 6, 6), 7, 12, 10) if size.tiny else (24, 128, (16, 56, 56), 512, 4096, 768)
    )
    model = _model(
        FluxTransformer2DModel,
        size,
        in_channels=64,
        num_layers=doubles,
        num_single_layers=size.layers - doubles,
        attention_head_dim=width,
        num_attention_heads=heads,
        joint_attention_dim=text_width,
        pooled_projection_dim=pooled,
        guidance_embeds=True,
        axes_dims_rope=axes,
    )
    ids_HW3 = torch.zeros(side, side, 3, device=size.device)
    ids_HW3[..., 1] = torch.arange(side, device=size.device)[:, None]
    ids_HW3[..., 2] = torch.arange(side, device=size.device)
    condition = {
        "encoder_hidden_states": _normal(size, size.batch, text, text_width),
        "pooled_projections": _normal(size, size.batch, pooled),
        "guidance": torch.full((size.batch,), 3.5, device=size.device),
        "txt_ids": torch.zeros(text, 3, device=size.device),
        "img_ids": ids_HW3.flatten(0, 1),
    }
    singles = _paths("single_transformer_blocks", size.layers - doubles, "attn")
    return Subject(
        size=size,
        model=model,
        sites=(*_paths("transformer_blocks", doubles, "attn"), *singles),
        noise=_normal(size, size.batch, side * side, 64),
        conditions=(condition,),
        cfg=None,
        text=(text, 0),
        time_scale=0.001,
        integer_time=False,
        noise_axis=2,
    )


def _wan(size: Size) -> Subject:
    from diffusers import WanTransformer3DModel

    size = _filled(size, layers=30, batch=1, tokens=21 * 30 * 52)
    assert size.layers is not None and size.batch is not None and size.tokens is not None
    rows, columns = (4, 4) if size.tiny else (30, 52)
    heads, width, text, text_width, mlp = (2, 16, 7, 12, 48) if size.tiny else (12, 128, 512, 4096, 8960)
    frames, rest = divmod(size.tokens, rows * columns)
    if rest:
        raise OptionError(
            "the video's tokens are no whole frames",
            where="--tokens",
            got=size.tokens,
            allowed=f"multiples of {rows * columns} ({rows} x {columns} tokens a frame)",
            todo=f"give {max(frames, 1) * rows * columns}",
        )
    model = _model(
        WanTransformer3DModel,
        size,
        num_attention_heads=heads,
        attention_head_dim=width,
        in_channels=16,
        out_channels=16,
        text_dim=text_width,
        freq_dim=32 if size.tiny else 256,
        ffn_dim=mlp,
        num_layers=size.layers,
        rope_max_seq_len=32 if size.tiny else 1024,
    )
    conditions = tuple({"encoder_hidden_states": _normal(size, size.batch, text, text_width)} for _ in range(2))
    return Subject(
        size=size,
        model=model,
        sites=_paths("blocks", size.layers, "attn1"),
        noise=_normal(size, size.batch, 16, frames, 2 * rows, 2 * columns),
        conditions=conditions,
        cfg="cond_call_first",
    )


SHAPES: Final[Mapping[str, Callable[[Size], Subject]]] = {
    "dit-xl-2-512": _dit,
    "pixart-sigma-1024": _pixart_1024,
    "pixart-sigma-2k": _pixart_2k,
    "sd3-medium-1024": _sd3,
    "flux-dev-1024": _flux,
    "wan-1.3b-480p": _wan,
}
"""Name to builder."""
