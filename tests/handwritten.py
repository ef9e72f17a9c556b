"""Denoisers written by hand in plain torch around other people's spellings of attention, as cases.

The attentions are in :mod:`spellings`, :mod:`joint_toys`, :mod:`opaque` and :mod:`stdit`. All cases trace as one
graph, but for ``stdit_ragged``, whose captions' lengths are read from a mask: its sites are in the last one.

Letters: B batch, N tokens, L text tokens, D width, C channels, H, W pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from joint_toys import JointBlock, SingleBlock
from models import CLASSES, Call, Case, Draw
from opaque import OpaqueAttention
from spellings import (
    ChannelsFirstAttention,
    CompressedAttention,
    GroupedAttention,
    MaskedAttention,
    TimmAttention,
    TorchAttention,
)
from stdit import STDiT
from torch import Tensor, nn
from zoo_joint import TEXT, build, paths, words

Make = Callable[[int, int, int], nn.Module]
"""Width, heads and tokens to an attention [B, N, D] -> [B, N, D]."""


class Embedding(nn.Module):
    """Timesteps [B] -> [B, D], by waves and an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        rates = torch.exp(-math.log(10000) * torch.arange(16, dtype=torch.float32, device=t.device) / 16)
        angles = t[:, None].float() * rates[None]
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))


class Block(nn.Module):
    """The original DiT's block; with more attentions than one they follow each other, gated each."""

    def __init__(self, width: int, heads: int, tokens: int, makes: Mapping[str, Make]) -> None:
        super().__init__()
        self.names = tuple(makes)
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        for name, make in makes.items():
            setattr(self, name, make(width, heads, tokens))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * (len(makes) + 1) * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        *triples, last = self.adaLN_modulation(c)[:, None].unflatten(-1, (-1, 3, x.shape[-1])).unbind(2)
        for name, triple in zip(self.names, triples, strict=True):
            shift, scale, gate = triple.unbind(2)
            x = x + gate * getattr(self, name)(self.norm1(x) * (1 + scale) + shift)
        shift, scale, gate = last.unbind(2)
        return x + gate * self.mlp(self.norm2(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """The original DiT, forward(x_BCHW, t, y), around attentions of any make; patches of 2 x 2."""

    def __init__(self, *, layers: int, width: int, heads: int, side: int, makes: Mapping[str, Make]) -> None:
        super().__init__()
        self.rows = side // 2
        self.x_embedder = nn.Conv2d(4, width, kernel_size=2, stride=2)
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, self.rows**2, width), requires_grad=False)
        self.t_embedder = Embedding(width)
        self.y_embedder = nn.Embedding(CLASSES + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads, self.rows**2, makes) for _ in range(layers))
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, 4 * 8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.linear(self.norm_final(x))
        x = x.reshape(x.shape[0], self.rows, self.rows, 2, 2, 8)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(x.shape[0], 8, 2 * self.rows, 2 * self.rows)


def around(
    name: str, makes: Mapping[str, Make], *, inner: str = "", layers: int = 2, side: int = 16, seed: int = 0
) -> Case:
    """The original DiT with these attentions in each block.

    Args:
        name: of the case.
        makes: attribute of a block to attention.
        inner: what of such an attribute is the site.
        layers: blocks.
        side: of the latents.
        seed: of the weights.
    """
    model = build(DiT, seed=seed, layers=layers, width=48, heads=4, side=side, makes=makes)

    def draw(by: Draw) -> Call:
        return (by.latents(4, side, side), by.times(), by.labels()), {}

    sites = tuple(f"blocks.{layer}.{attribute}{inner}" for layer in range(layers) for attribute in makes)
    return Case(name, model, draw, sites, (), layers, "cond_first", (side // 2) ** 2)


def timm_dit(**options: Any) -> Case:
    """The original DiT; options are those of :class:`~spellings.TimmAttention`."""
    return around("timm_dit", {"attn": functools.partial(TimmAttention, **options)})


def mha(**options: bool) -> Case:
    """nn.MultiheadAttention; options are those of :class:`~spellings.TorchAttention`."""
    return around("mha", {"attn": functools.partial(TorchAttention, **options)}, inner=".mha")


def gqa(sharing: str) -> Case:
    """Grouped heads, which meet by ``sharing``; see :class:`~spellings.GroupedAttention`."""
    return around("gqa", {"attn": functools.partial(GroupedAttention, sharing=sharing)})


def kv_compressed() -> Case:
    """64 queries meet 16 keys, each of four tokens."""
    return around("kv_compressed", {"attn": CompressedAttention})


def opaque(kind: str) -> Case:
    """Attention as an operator of another library; see :class:`~opaque.OpaqueAttention`."""
    return around("opaque", {"attn": functools.partial(OpaqueAttention, kind=kind)})


def masked(masking: str) -> Case:
    """Scores that are overwritten; see :class:`~spellings.MaskedAttention`."""
    return around("masked", {"attn": functools.partial(MaskedAttention, masking=masking)})


def channels_first(product: str, padding: int | str = 0) -> Case:
    """Attention of convolution nets; see :class:`~spellings.ChannelsFirstAttention`."""
    return around(
        "channels_first", {"attn": functools.partial(ChannelsFirstAttention, product=product, padding=padding)}
    )


def two_in_block() -> Case:
    """Two self-attentions in sequence in each block."""
    return around("two_in_block", {"attn1": TimmAttention, "attn2": TimmAttention})


def stdit(
    *,
    qk_norm: bool = False,
    rope: bool = False,
    fused: bool = False,
    ragged: bool = False,
    layers: int = 2,
    frames: int = 6,
    side: int = 12,
    seed: int = 0,
) -> Case:
    """Open-Sora's STDiT: spatial sites have (side / 2)^2 tokens, temporal ones a token for each frame.

    With ``ragged`` captions have lengths of their own, the same for both halves of CFG.
    """
    model = build(
        STDiT,
        seed=seed,
        layers=layers,
        width=48,
        heads=4,
        frames=frames,
        side=side,
        channels=4,
        caption_channels=20,
        qk_norm=qk_norm,
        rope=rope,
        fused=fused,
    )

    def draw(by: Draw) -> Call:
        lengths = TEXT - 2 - 3 * (torch.arange(by.batch // 2) % 3)
        mask = {"mask": (torch.arange(TEXT) < lengths[:, None]).long()} if ragged else {}
        return (by.latents(4, frames, side, side), by.times()), {"y": words(by, 1, TEXT, 20), **mask}

    sites = tuple(f"blocks.{layer}.{attn}" for layer in range(layers) for attn in ("attn", "attn_temp"))
    rejected = paths(("blocks", layers), attn="cross_attn")
    return Case("stdit", model, draw, sites, rejected, layers, "cond_first", (side // 2) ** 2)


class JointToy(nn.Module):
    """A denoiser of image tokens [B, N, C] and text [B, L, C'], forward(x, t, text)."""

    def __init__(self, *, layers: int, width: int, tokens: int, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.embed, self.text_embed = nn.Linear(4, width), nn.Linear(20, width)
        self.position = nn.Parameter(0.5 * torch.randn(tokens, width))
        self.time = Embedding(width)
        self.blocks = nn.ModuleList(make(width, 4) for _ in range(layers))
        self.out = nn.Linear(width, 4)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        image, text = self.embed(x) + self.position, self.text_embed(text)
        embedding_BD = self.time(t) + text.mean(dim=1)
        for block in self.blocks:
            image, text = block(image, text, embedding_BD)
        return self.out(F.layer_norm(image, image.shape[-1:]))


def joint_toy(style: str, text_first: bool, *, layers: int = 3, tokens: int = 64, seed: int = 0) -> Case:
    """Text and image in one attention.

    Args:
        style: joined after the "projections", with two of them for the output; before them, as one "source";
            so too, but with the output projection "shared" with the MLP, or "inline" in the block itself.
        text_first: where the text stands.
        layers: blocks.
        tokens: of the image.
        seed: of the weights.
    """
    make: Callable[[int, int], nn.Module]
    if style in ("projections", "source"):
        make = functools.partial(JointBlock, text_first=text_first, joined=style)
    else:
        make = functools.partial(SingleBlock, text_first=text_first, inline=style == "inline")
    model = build(JointToy, seed=seed, layers=layers, width=48, tokens=tokens, make=make)

    def draw(by: Draw) -> Call:
        return (by.latents(tokens, 4), by.times(), words(by, TEXT, 20)), {}

    sites = tuple(f"blocks.{layer}{'' if style == 'inline' else '.attn'}" for layer in range(layers))
    return Case("joint_toy", model, draw, sites, (), layers, "uncond_first", tokens)


HANDWRITTEN: Final[Mapping[str, Callable[[], Case]]] = {
    "stdit": stdit,
    "stdit_norm_rope": functools.partial(stdit, qk_norm=True, rope=True),
    "stdit_fused": functools.partial(stdit, fused=True),
    "stdit_ragged": functools.partial(stdit, ragged=True),
    "timm_sdpa": timm_dit,
    "timm_sdpa_bias": functools.partial(timm_dit, bias=True),
    "timm_matmul": functools.partial(timm_dit, product="matmul"),
    "timm_matmul_scores": functools.partial(timm_dit, product="matmul", scale="scores", softmax="function"),
    "timm_matmul_divide": functools.partial(timm_dit, product="matmul", scale="divide", softmax="module"),
    "timm_matmul_dropout": functools.partial(timm_dit, product="matmul", dropout=True),
    "timm_matmul_bias": functools.partial(timm_dit, product="matmul", scale="scores", bias=True),
    "timm_baddbmm": functools.partial(timm_dit, product="baddbmm"),
    "timm_baddbmm_bias": functools.partial(timm_dit, product="baddbmm", bias=True),
    "timm_bmm": functools.partial(timm_dit, product="bmm", scale="scores", softmax="function", dropout=True),
    "timm_bmm_bias": functools.partial(timm_dit, product="bmm", bias=True),
    "timm_einsum": functools.partial(timm_dit, product="einsum", scale="scores"),
    "timm_einsum_folded": functools.partial(timm_dit, product="einsum_folded", scale="scores"),
    "mha": mha,
    "mha_weights": functools.partial(mha, need_weights=True),
    "mha_tokens_first": functools.partial(mha, batch_first=False),
    "gqa_repeat": functools.partial(gqa, "repeat_interleave"),
    "gqa_expand": functools.partial(gqa, "expand"),
    "gqa_enabled": functools.partial(gqa, "enable_gqa"),
    "kv_compressed": kv_compressed,
    "opaque_flash": functools.partial(opaque, "flash"),
    "opaque_xformers": functools.partial(opaque, "xformers"),
    "opaque_sage_hnd": functools.partial(opaque, "sage_hnd"),
    "opaque_sage_nhd": functools.partial(opaque, "sage_nhd"),
    "masked_fill": functools.partial(masked, "fill"),
    "masked_fill_inf": functools.partial(masked, "fill_inf"),
    "masked_where": functools.partial(masked, "where"),
    "masked_where_tensor": functools.partial(masked, "where_tensor"),
    "masked_sdpa": functools.partial(masked, "sdpa"),
    "channels_first_einsum": functools.partial(channels_first, "einsum"),
    "channels_first_bmm": functools.partial(channels_first, "bmm", "same"),
    "channels_first_function": functools.partial(channels_first, "function"),
    "channels_first_sdpa": functools.partial(channels_first, "sdpa"),
    "two_in_block": two_in_block,
    "joint_projections_first": functools.partial(joint_toy, "projections", text_first=True),
    "joint_projections_last": functools.partial(joint_toy, "projections", text_first=False),
    "joint_source_first": functools.partial(joint_toy, "source", text_first=True),
    "joint_source_last": functools.partial(joint_toy, "source", text_first=False),
    "joint_shared_first": functools.partial(joint_toy, "shared", text_first=True),
    "joint_shared_last": functools.partial(joint_toy, "shared", text_first=False),
    "joint_inline": functools.partial(joint_toy, "inline", text_first=True),
}
"""Name to builder, as :data:`models.CASES`."""

TEXT_TOKENS: Final[Mapping[str, tuple[int, str]]] = {
    name: (TEXT, "last" if name.endswith("last") else "first") for name in HANDWRITTEN if name.startswith("joint")
}
"""Name of a case with joint attention to the number of text tokens beside the image's, and their side."""

SMALLER: Final[Mapping[str, Mapping[str, int]]] = {
    name: {f"blocks.{layer}.attn_temp": 6 for layer in range(2)} for name in HANDWRITTEN if name.startswith("stdit")
}
"""Name of a case to those of its sites that have another number of tokens than its ``tokens``."""
