"""Open-Sora's STDiT and its own sampler: a denoiser outside diffusers, for ``difa_fx.calibrate(model, sampler=)``.

The real one comes from the package ``opensora`` (versions 1.0 and 1.1) and one of its configuration files; the tiny one
has stand-ins with the same interfaces. What Open-Sora does in a way that breaks Dynamo's graph is done here in another
that gives the same numbers: captions are padded and masked, not packed by their lengths, and the height and width are
known to Python.

Letters: B batch, T frames, S tokens of a frame, N = T * S, L caption tokens, D width, C channels, H, W pixels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difa_fx.errors import AttachError, OptionError


class Captions(nn.Module):
    """Which caption tokens are real, ``kept`` [B, L]; one for all layers of a denoiser."""

    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones(1, 1, dtype=torch.bool), persistent=False)


class PaddedCrossAttention(nn.Module):
    """Open-Sora's attention to captions, with the padding masked.

    Its own lays the real tokens of all samples out as one sequence, by lengths that it reads off a tensor. This one
    takes all tokens and has the same weights and results.
    """

    def __init__(self, packed: Any, captions: Captions) -> None:
        super().__init__()
        self.heads = int(packed.num_heads)
        self.q_linear, self.kv_linear, self.proj = packed.q_linear, packed.kv_linear, packed.proj
        self.captions = captions

    def forward(self, x_BND: Tensor, y_1LD: Tensor, lengths: object) -> Tensor:
        """Attend to the captions, [B, N, D]; ``lengths`` are not asked."""
        batch, tokens, width = x_BND.shape
        q = self.q_linear(x_BND).view(batch, tokens, self.heads, -1).transpose(1, 2)
        kv = self.kv_linear(y_1LD).view(batch, -1, 2, self.heads, width // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        mask = self.captions.kept[:, None, None]
        y_BHNd = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(y_BHNd.transpose(1, 2).reshape(batch, tokens, width))  # type: ignore[no-any-return]


class Size:
    """Heights or widths [B] that are all ``value``, which can be read without breaking a graph."""

    def __init__(self, values_B: Tensor, value: float) -> None:
        self.values, self.value = values_B, value

    def __getitem__(self, index: Any) -> Any:
        return _Number(self.value) if isinstance(index, int) else self.values[index]


class _Number:
    def __init__(self, value: float) -> None:
        self.value = value

    def item(self) -> float:
        return self.value


def pad_captions(denoiser: Any) -> Captions:
    """Give every block of an STDiT a :class:`PaddedCrossAttention`; returns the mask they share."""
    captions = Captions()
    for block in denoiser.blocks:
        block.cross_attn = PaddedCrossAttention(block.cross_attn, captions)
    return captions


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenSora:
    """A text-to-video model in parts, with the interfaces that Open-Sora's have.

    Attributes:
        denoiser: STDiT, its captions padded.
        captions: which caption tokens are real.
        text: ``encode(prompts)`` to ``{"y": ..., "mask": ...}``, ``null(n)``.
        sampler: ``sample(model, text, z=, prompts=, device=, additional_args=)`` to latents [B, C, T, H, W].
        vae: ``decode(latents)`` to videos [B, 3, T, H, W] from -1 to 1.
        latent_shape: (C, T, H, W).
        dtype: of latents.
        sizes: what the denoiser is told of every sample, name to value.
        clean: a prompt as the text encoder wants it.
    """

    denoiser: Any
    captions: Captions
    text: Any
    sampler: Any
    vae: Any
    latent_shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    sizes: Mapping[str, float] = field(default_factory=dict)
    clean: Callable[[str], str] = str

    @property
    def tokens(self) -> int:
        """S, of a frame; patches are 1 x 2 x 2."""
        return (self.latent_shape[-2] // 2) * (self.latent_shape[-1] // 2)

    def sample(self, denoiser: Any, prompts: Sequence[str]) -> Tensor:
        """Latents of one generation, by torch's generator."""
        device = self.captions.kept.device
        z_BCTHW = torch.randn(len(prompts), *self.latent_shape).to(device, self.dtype)
        told: dict[str, Any] = {}
        for name, value in self.sizes.items():
            values_B = torch.full((len(prompts),), value, device=device, dtype=self.dtype)
            told[name] = Size(values_B, value) if name in ("height", "width") else values_B
        caller, cleaned = _Caller(denoiser, self.captions), [self.clean(prompt) for prompt in prompts]
        latents = self.sampler.sample(
            caller, self.text, z=z_BCTHW, prompts=cleaned, device=device, additional_args=told
        )
        assert isinstance(latents, Tensor)
        return latents

    def draw(self, denoiser: Any, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Videos [B, T, 3, H, W] from 0 to 1; the noise of a batch is that of its first seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seeds[0])
            video: Tensor = self.vae.decode(self.sample(denoiser, prompts).to(self.dtype))
        return (video.float().cpu() / 2 + 0.5).clamp(0, 1).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class _Caller:
    """The model as Open-Sora's samplers call it: by ``forward``, which would pass a compiled module's code by."""

    denoiser: Any
    captions: Captions

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor | None = None, **told: Any) -> Any:
        if mask is None:
            self.captions.kept = torch.ones(len(y), y.shape[2], dtype=torch.bool, device=y.device)
        else:
            self.captions.kept = mask.reshape(mask.shape[0], -1).repeat(len(y) // mask.shape[0], 1) != 0
        return self.denoiser(x, timestep, y, **told)

    __call__ = forward


def load(config: str, *, steps: int, cfg_scale: float, device: str) -> OpenSora:
    """The real model, by one of Open-Sora's configuration files.

    Args:
        config: the file, such as ``configs/opensora/inference/16x256x256.py`` of its repository.
        steps: of the sampler.
        cfg_scale: guidance scale.
        device: where it runs.

    Raises:
        AttachError: the package is not installed.
        OptionError: the file is not there.
    """
    missing = [name for name in ("opensora", "mmengine") if importlib.util.find_spec(name) is None]
    if missing:
        raise AttachError(
            "Open-Sora is not installed",
            where="run_opensora",
            got=f"no package {' and no '.join(missing)}",
            allowed="Open-Sora 1.0 or 1.1, from github.com/hpcaitech/Open-Sora",
            todo="install it as its README says, or try the script without: --random-weights --tiny",
        )
    if not Path(config).is_file():
        raise OptionError(
            "the configuration file is not there",
            where="--config",
            got=config,
            allowed="one of Open-Sora's files for inference",
            todo="give the path of configs/opensora/inference/16x256x256.py in its repository, or of one of your own",
        )
    return _built(config, steps, cfg_scale, device)


def _built(config: str, steps: int, cfg_scale: float, device: str) -> OpenSora:
    from mmengine.config import Config
    from opensora.models.text_encoder import t5
    from opensora.registry import MODELS, SCHEDULERS, build_module
    from opensora.utils.misc import to_torch_dtype

    cfg = Config.fromfile(config)
    dtype = to_torch_dtype(cfg.dtype)
    vae = build_module(cfg.vae, MODELS).to(device, dtype).eval()
    latent_size = vae.get_latent_size((cfg.num_frames, *cfg.image_size))
    text = build_module(cfg.text_encoder, MODELS, device=device)
    # Apex's layer norm is no operator that a compiler can look into.
    kernels = {"enable_layernorm_kernel": False} if "enable_layernorm_kernel" in cfg.model else {}
    denoiser = build_module(
        {**cfg.model, **kernels},
        MODELS,
        input_size=latent_size,
        in_channels=vae.out_channels,
        caption_channels=text.output_dim,
        model_max_length=text.model_max_length,
    )
    denoiser = denoiser.to(device, dtype).eval()
    text.y_embedder = denoiser.y_embedder  # it holds the null caption
    sampler = build_module({**cfg.scheduler, "num_sampling_steps": steps, "cfg_scale": cfg_scale}, SCHEDULERS)
    height, width = cfg.image_size
    several = {"height": height, "width": width, "num_frames": cfg.num_frames, "ar": height / width, "fps": cfg.fps}
    return OpenSora(
        denoiser=denoiser,
        captions=pad_captions(denoiser).to(device),
        text=text,
        sampler=sampler,
        vae=vae,
        latent_shape=(vae.out_channels, *latent_size),
        dtype=dtype,
        sizes=several if cfg.get("multi_resolution") == "STDiT2" else {},
        clean=getattr(t5, "text_preprocessing", str),  # 1.0 cleans prompts by itself
    )


class ByteText:
    """A caption's bytes as random embeddings: [B, 1, L, D] and a mask [B, L]."""

    def __init__(self, width: int, length: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = 4 * torch.randn(256, width, generator=generator)
        self.nothing = torch.randn(length, width, generator=generator)
        self.length = length

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The captions, cut to L bytes and padded with zeros."""
        rows = [torch.tensor(list(prompt.encode()[: self.length])) for prompt in prompts]
        y_BLD = torch.stack([F.pad(self.table[row], (0, 0, 0, self.length - len(row))) for row in rows])
        mask_BL = torch.stack([torch.arange(self.length) < len(row) for row in rows]).long()
        return {"y": y_BLD[:, None], "mask": mask_BL}

    def null(self, count: int) -> Tensor:
        """The caption of no caption."""
        return self.nothing.expand(count, 1, -1, -1)


class DDIM:
    """DDIM with guidance, called as Open-Sora's samplers are; the conditional half comes first."""

    def __init__(self, num_sampling_steps: int, cfg_scale: float) -> None:
        from diffusers import DDIMScheduler

        self.scheduler = DDIMScheduler(beta_schedule="linear", beta_end=0.02, beta_start=0.0001, clip_sample=False)
        self.steps, self.cfg_scale = num_sampling_steps, cfg_scale

    def sample(
        self, model: Any, text: Any, *, z: Tensor, prompts: Sequence[str], device: Any, additional_args: Any
    ) -> Tensor:
        """Latents [B, C, T, H, W]."""
        told = text.encode(prompts)
        told["y"] = torch.cat([told["y"], text.null(len(prompts))])
        told = {name: value.to(device) for name, value in told.items()}
        self.scheduler.set_timesteps(self.steps)
        for time in self.scheduler.timesteps:
            times_B = time.expand(2 * len(prompts)).to(device)
            output = model.forward(torch.cat([z, z]), times_B, **told, **additional_args)
            cond, uncond = output[:, : z.shape[1]].chunk(2)
            z = self.scheduler.step(uncond + self.cfg_scale * (cond - uncond), time, z).prev_sample
        return z


class FrameVAE:
    """diffusers' autoencoder, frame by frame."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """Videos [B, 3, T, H, W]."""
        frames = [self.vae.decode(frame_BCHW).sample for frame_BCHW in z_BCTHW.unbind(2)]
        return torch.stack(frames, dim=2)


def random_weights(*, tiny: bool, steps: int, cfg_scale: float, device: str = "cpu", seed: int = 0) -> OpenSora:
    """STDiT with random weights between stand-ins: as in Open-Sora 1.0 at 256 pixels, or with 5 frames of 36 tokens."""
    from random_weights import autoencoder, wake
    from stdit import STDiT

    frames, side, length = (5, 12, 24) if tiny else (16, 32, 120)
    sizes = {"layers": 2, "width": 48, "heads": 3} if tiny else {"layers": 28, "width": 1152, "heads": 16}
    captions = 16 if tiny else 4096
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        shape = {"frames": frames, "side": side, "channels": 4, "caption_channels": captions}
        denoiser = wake(STDiT(**sizes, **shape, qk_norm=False, rope=False, fused=True), seed)
        vae = FrameVAE(autoencoder().to(device))
    return OpenSora(
        denoiser=denoiser.to(device),
        captions=pad_captions(denoiser).to(device),
        text=ByteText(captions, length, seed),
        sampler=DDIM(steps, cfg_scale),
        vae=vae,
        latent_shape=(4, frames, side, side),
    )
