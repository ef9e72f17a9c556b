"""Small denoisers to test on: diffusers' DiT and PixArt, and toys that hold one trap each.

Each is a :class:`Case`: the module, what it is called with, and what difa_fx should find in it.
All are seeded, in eval mode and woken: every site's attention has a measurable say in the output.

Letters: B batch (both CFG halves together), N tokens, C channels, L caption tokens.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from toys import Toy

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call of a denoiser."""

CLASSES: Final = 10


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A denoiser with all that a test has to know of it.

    Attributes:
        name: for messages.
        model: the denoiser.
        draw: the arguments of a call, by way of :meth:`inputs`.
        sites: paths of its self-attentions, in order.
        rejected: paths of attentions that no plan may change.
        blocks: repeated blocks.
        cfg_order: which half of the batch is the conditional one; None: there are no halves.
        tokens: N, of each site.
        batch: a batch size that shows what the case is about.
    """

    name: str
    model: nn.Module
    draw: Callable[[Draw], Call]
    sites: tuple[str, ...]
    rejected: tuple[str, ...]
    blocks: int
    cfg_order: str | None
    tokens: int
    batch: int = 4

    def inputs(self, timestep: float, batch: int, generator: torch.Generator, same_halves: bool = False) -> Call:
        """Random arguments of a call.

        With CFG the halves have equal latents and unequal conditions; ``same_halves`` makes
        these equal too.
        """
        return self.draw(Draw(timestep, batch, generator, self.cfg_order, same_halves))

    def generation(
        self,
        steps: int,
        batch: int | None = None,
        seed: int = 0,
        same_halves: bool = False,
        *,
        afresh: bool = False,
        related: bool = False,
    ) -> list[Call]:
        """Arguments of a generation's calls: timesteps fall, latents are drawn afresh, conditions stay the same.

        With ``afresh`` conditions are drawn anew, too, as no sampler does.  With ``related`` latents are much like the
        first ones, as a sampler's are.
        """
        generator = torch.Generator().manual_seed(seed)
        times = [1000 * (steps - step) // steps - 1 for step in range(steps)]
        drawn = [self.inputs(t, batch or self.batch, generator, same_halves) for t in times]
        calls = drawn if afresh else [_with_conditions_of(drawn[0], call) for call in drawn]
        return [_like(drawn[0], call) for call in calls] if related else calls


_MOVING: Final = re.compile(r"hidden_states|sample|.*latents|x|img|z|t|timesteps?|sigmas?|time|audio_hidden_states")
"""Names of inputs that differ from step to step."""


def _with_conditions_of(first: Call, call: Call) -> Call:
    """``call`` with the conditions of another: all but the latents, what is like them, and the timestep."""
    args = [own if index < 2 or _moves(own, call[0][0]) else first[0][index] for index, own in enumerate(call[0])]
    return tuple(args), {name: v if _MOVING.fullmatch(name) else first[1][name] for name, v in call[1].items()}


def _like(first: Call, call: Call) -> Call:
    """``call`` with samples that are mostly those of ``first``."""

    def mixed(own: Any, before: Any) -> Any:
        sample = isinstance(own, Tensor) and own.is_floating_point() and own.ndim > 2
        return before + 0.3 * own if sample else own

    args = [mixed(own, before) for own, before in zip(call[0], first[0], strict=True)]
    return tuple(args), {name: mixed(v, first[1][name]) for name, v in call[1].items()}


def _moves(value: Any, latents: Any) -> bool:
    """Whether a positional argument is one more sample, or the time."""
    if not isinstance(value, Tensor) or value.shape == latents.shape:
        return True
    return value.ndim <= 1 and bool((value == value.flatten()[0]).all())


@dataclass(frozen=True, slots=True)
class Draw:
    """Draws the arguments of one call."""

    timestep: float
    batch: int
    generator: torch.Generator
    cfg_order: str | None
    same_halves: bool

    def times(self) -> Tensor:
        """The timestep for each sample, [B]."""
        return torch.full((self.batch,), int(self.timestep))

    def latents(self, *shape: int) -> Tensor:
        """[B, *shape], with CFG twice the same half."""
        if self.cfg_order is None:
            return torch.randn(self.batch, *shape, generator=self.generator)
        half = torch.randn(self.batch // 2, *shape, generator=self.generator)
        return torch.cat([half, half])

    def condition(self, make: Callable[[int, torch.Generator], Tensor], null: Tensor) -> Tensor:
        """``make(rows)`` for all samples; with CFG for one half, and ``null`` for the other."""
        if self.cfg_order is None:
            return make(self.batch, self.generator)
        cond = make(self.batch // 2, self.generator)
        if self.same_halves:
            return torch.cat([cond, cond])
        uncond = null.expand_as(cond)
        return torch.cat([cond, uncond] if self.cfg_order == "cond_first" else [uncond, cond])

    def labels(self) -> Tensor:
        """Class labels [B]; the unconditional half has the class after the last."""
        return self.condition(lambda rows, gen: torch.randint(CLASSES, (rows,), generator=gen), torch.tensor(CLASSES))

    def key_mask(self, tokens: int) -> Tensor:
        """Bool [B, N], True for real tokens: at least three quarters, more in some samples."""

        def lengths(rows: int, gen: torch.Generator) -> Tensor:
            return torch.randint(tokens * 3 // 4, tokens, (rows,), generator=gen)

        return torch.arange(tokens) < self.condition(lengths, torch.tensor(tokens))[:, None]

    def mask(self, kind: str, tokens: int) -> Tensor:
        """A mask as SDPA takes it: "bool" or "additive" [B, 1, 1, N], or "bias" [B, 1, N, N].

        Padding weighs -20, since a sum with -10000 keeps too few digits to compare results by.
        """
        real = self.key_mask(tokens)[:, None, None]
        if kind == "bool":
            return real
        rows = tokens if kind == "bias" else 1
        bias = self.condition(lambda n, gen: torch.randn(n, 1, rows, tokens, generator=gen), torch.tensor(0.0))
        return bias.masked_fill(~real, -20.0)


def tensor_of(output: Any) -> Tensor:
    """The denoiser's result in whatever it was handed out."""
    if isinstance(output, Tensor):
        return output
    found = output[0]
    assert isinstance(found, Tensor)
    return found


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest value expected."""
    return float((got - expected).abs().max() / expected.abs().max())


def wake(model: nn.Module, *, seed: int = 0, size: float = 0.2) -> nn.Module:
    """Adds noise to every constant parameter: a fresh gate is zero and hides its attention."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.min() == parameter.max():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def dit(
    *,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    sample_size: int = 8,
    patch: int = 1,
    channels: int = 4,
    cfg_order: str | None = "cond_first",
    seed: int = 0,
) -> Case:
    """Diffusers' class-conditional DiT, called as DiTPipeline does; N = (sample_size / patch)^2."""
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=channels,
            out_channels=2 * channels,
            num_layers=layers,
            sample_size=sample_size,
            patch_size=patch,
            num_embeds_ada_norm=CLASSES,
        )

    def draw(by: Draw) -> Call:
        latents_BCHW = by.latents(channels, sample_size, sample_size)
        return (latents_BCHW,), {"timestep": by.times(), "class_labels": by.labels()}

    sites = tuple(f"transformer_blocks.{layer}.attn1" for layer in range(layers))
    tokens = (sample_size // patch) ** 2
    woken = wake(model, seed=seed).eval()
    return Case(f"dit{layers}", woken, draw, sites, (), layers, cfg_order, tokens)


def digits() -> Case:
    """The bundled denoiser with its own weights; 1 024 tokens."""
    from digits import NULL_CLASS, load_pipeline

    model = load_pipeline().transformer

    def draw(by: Draw) -> Call:
        labels = by.labels()
        labels = torch.where(labels == CLASSES, NULL_CLASS, labels)
        return (by.latents(1, 32, 32),), {"timestep": by.times(), "class_labels": labels}

    sites = tuple(f"transformer_blocks.{layer}.attn1" for layer in range(6))
    return Case("digits", model, draw, sites, (), 6, "cond_first", 1024, batch=2)


def pixart(
    *,
    layers: int = 2,
    width: int = 48,
    heads: int = 3,
    sample_size: int = 8,
    patch: int = 1,
    caption_channels: int = 20,
    caption_tokens: int = 12,
    sizes: bool = False,
    cfg_order: str | None = "uncond_first",
    seed: int = 0,
) -> Case:
    """Diffusers' PixArt, called as its pipelines do; captions are ragged.

    With ``sizes`` it is also told resolution and aspect ratio; its width must be a multiple of 3.
    """
    from diffusers import PixArtTransformer2DModel

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = PixArtTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            num_layers=layers,
            cross_attention_dim=width,
            sample_size=sample_size,
            patch_size=patch,
            caption_channels=caption_channels,
            use_additional_conditions=sizes,
        )
        null_LC = torch.randn(1, caption_tokens, caption_channels)

    def draw(by: Draw) -> Call:
        def caption(rows: int, gen: torch.Generator) -> Tensor:
            # Loud, so that two layers are enough for the halves to part.
            return 8 * torch.randn(rows, caption_tokens, caption_channels, generator=gen)

        latents_BCHW = by.latents(4, sample_size, sample_size)
        pixels = torch.tensor([8.0 * sample_size, 8.0 * sample_size]).repeat(by.batch, 1)
        ratio = torch.ones(by.batch, 1)
        return (latents_BCHW,), {
            "encoder_hidden_states": by.condition(caption, null_LC),
            "encoder_attention_mask": by.key_mask(caption_tokens).long(),
            "timestep": by.times(),
            "added_cond_kwargs": {
                "resolution": pixels if sizes else None,
                "aspect_ratio": ratio if sizes else None,
            },
            "return_dict": False,
        }

    blocks = [f"transformer_blocks.{layer}" for layer in range(layers)]
    return Case(
        f"pixart{layers}{'_sizes' if sizes else ''}",
        wake(model, seed=seed).eval(),
        draw,
        tuple(f"{block}.attn1" for block in blocks),
        tuple(f"{block}.attn2" for block in blocks),
        layers,
        cfg_order,
        (sample_size // patch) ** 2,
    )


def toy(
    *,
    blocks: int = 2,
    width: int = 32,
    heads: int = 2,
    tokens: int = 48,
    channels: int = 4,
    batch: int = 4,
    cfg_order: str | None = "cond_first",
    mask: str | None = None,
    named: bool = False,
    image: bool = False,
    frames: int = 1,
    one_time: bool = False,
    seed: int = 0,
    **options: Any,
) -> Case:
    """A :class:`~toys.Toy`.

    Args:
        tokens: N; a square number for an image.
        mask: an input for every attention, of a kind that :meth:`Draw.mask` knows.
        named: two blocks that are attributes, ``block_a`` and ``block_b``.
        image: latents are [B, C, rows, rows] instead of [B, N, C].
        frames: parts of the sequence that attend each to itself alone, folded into the batch.
        one_time: the timestep is 0-d.
        **options: of :class:`~toys.ToyAttention`.
    """
    sizes = {"width": width, "heads": heads, "tokens": tokens, "channels": channels}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        shape = {"named": named, "image": image, "frames": frames, "classes": CLASSES}
        model = Toy(blocks=blocks, **sizes, **shape, **options)
    side = round(tokens**0.5)

    def draw(by: Draw) -> Call:
        x = by.latents(channels, side, side) if image else by.latents(tokens, channels)
        time = torch.tensor(by.timestep) if one_time else by.times()
        masks = () if mask is None else (by.mask(mask, tokens),)
        return (x, time, by.labels(), *masks), {}

    paths = ("block_a", "block_b") if named else tuple(f"blocks.{i}" for i in range(blocks))
    sites = tuple(f"{path}.attn" for path in paths)
    woken = wake(model, seed=seed).eval()
    args = (woken, draw, sites, (), len(paths), cfg_order, tokens // frames, batch)
    return Case("toy", *args)


CASES: Final[Mapping[str, Callable[[], Case]]] = {
    "dit": dit,
    "digits": digits,
    "pixart": pixart,
    "pixart_sizes": functools.partial(pixart, sizes=True),
    "toy_one_block": functools.partial(toy, blocks=1),
    "toy_three_blocks": functools.partial(toy, blocks=3, cfg_order="uncond_first"),
    "toy_odd_batch": functools.partial(toy, batch=3, cfg_order=None),
    "toy_named": functools.partial(toy, named=True),
    "toy_image": functools.partial(toy, image=True, tokens=49, one_time=True),
    "toy_mask_bool": functools.partial(toy, mask="bool"),
    "toy_mask_additive": functools.partial(toy, mask="additive", cfg_order="uncond_first"),
    "toy_mask_bias": functools.partial(toy, mask="bias"),
    "toy_fused": functools.partial(toy, fused=True),
    "toy_fused_odd": functools.partial(toy, fused=True, batch=3, cfg_order=None),
    "toy_rotary": functools.partial(toy, rotary="rotate", qk_norm=True),
    "toy_rotary_inplace": functools.partial(toy, rotary="inplace", cfg_order="uncond_first"),
    "toy_rotary_tokens_as_batch": functools.partial(toy, rotary="rotate", qk_norm=True, tokens=16, batch=16),
    "toy_table_as_batch": functools.partial(toy, table=2, batch=2),
    "toy_frames": functools.partial(toy, frames=3, batch=2, fused=True),
}
"""Name to builder, for ``pytest.mark.parametrize``; :func:`case` builds."""

CFG_CASES: Final = tuple(name for name in CASES if "odd" not in name)
"""The cases whose batch is two halves."""


@functools.cache
def case(name: str) -> Case:
    """The case of that name, built once; tests leave its model as it was."""
    return replace(CASES[name](), name=name)
