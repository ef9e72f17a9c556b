"""Denoisers and pipelines of diffusers, from a folder or the hub, and inputs to try them on."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from difa_fx.errors import AttachError, DifaError, OptionError


def load_denoiser(source: str, *, subfolder: str | None = None, random_weights: bool = False) -> nn.Module:
    """A diffusers denoiser from a folder or the hub, by the class its config names.

    Args:
        source: folder or hub name.
        subfolder: where in it the denoiser lies, for instance ``transformer``.
        random_weights: read the config alone.

    Raises:
        AttachError: there is no config of a diffusers model.
    """
    diffusers = _diffusers()
    try:
        config = diffusers.DiTTransformer2DModel.load_config(source, subfolder=subfolder)
        name = config.get("_class_name") if isinstance(config, dict) else None
        kind: Any = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
        if not _is_model(kind, diffusers):
            raise ValueError(f"its config names {name!r}, which is no model of diffusers")
        model = kind.from_config(config) if random_weights else kind.from_pretrained(source, subfolder=subfolder)
    except Exception as error:
        raise AttachError(
            "no diffusers denoiser can be loaded",
            where=source,
            got=_first_line(error),
            allowed="a folder or hub name with a config.json that names a diffusers model",
            todo="name the denoiser's own folder (or --subfolder transformer), or give module:function",
        ) from error
    return model.eval()  # type: ignore[no-any-return]


def _is_model(kind: object, diffusers: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)


def _diffusers() -> Any:
    """The package, which is not needed for anything else."""
    try:
        import diffusers
    except ImportError as error:
        raise AttachError(
            "diffusers cannot be imported, and only it can load this",
            where="import diffusers",
            got=_first_line(error),
            allowed="module:function, which needs no diffusers",
            todo="pip install diffusers",
        ) from error
    return diffusers


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def load_pipeline(source: str, *, dtype: str = "auto", device: str | None = None) -> Any:
    """A diffusers pipeline from a folder or the hub.

    Args:
        source: folder or hub name.
        dtype: ``float32``, ``float16``, ``bfloat16``, or ``auto`` for the weights' own.
        device: where it goes; CUDA where there is one when None, the process's own under ``torchrun``.

    Raises:
        AttachError: there is no pipeline.
        OptionError: the dtype is unknown.
    """
    if dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise OptionError(
            "unknown dtype",
            where="dtype",
            got=dtype,
            allowed=("auto", "float32", "float16", "bfloat16"),
            todo="use one of the allowed values",
        )
    place = device or (f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")
    settings = {} if dtype == "auto" else {"torch_dtype": getattr(torch, dtype)}
    try:
        return _diffusers().DiffusionPipeline.from_pretrained(source, **settings).to(place)
    except DifaError:
        raise
    except Exception as error:
        raise AttachError(
            "no diffusers pipeline can be loaded",
            where=source,
            got=_first_line(error),
            allowed="a folder or hub name with a model_index.json",
            todo="name a pipeline's folder, or give module:function",
        ) from error


def example_inputs(model: Any, *, batch: int = 2) -> dict[str, Any]:
    """Random inputs of the right shapes for an image denoiser that takes latents [B, C, H, W].

    Covers what the configs of diffusers' DiT, PixArt, SD3 and UNet kinds tell; others are given by hand.

    Args:
        model: a diffusers model.
        batch: B.

    Raises:
        AttachError: an input that the config says nothing about.
    """
    config = model.config
    size, channels = config.get("sample_size"), config.get("in_channels")
    takes = inspect.signature(model.forward).parameters
    if not isinstance(size, int) or channels is None or ("hidden_states" not in takes and "sample" not in takes):
        raise AttachError(
            "example inputs cannot be made up for this model",
            where=type(model).__name__,
            got=f"sample_size={size}, in_channels={channels}",
            allowed="a denoiser of latents [B, C, H, W]",
            todo="give module:function that returns (model, args, kwargs)",
        )
    text = config.get("caption_channels") or config.get("joint_attention_dim") or config.get("cross_attention_dim")
    made: dict[str, Any] = {
        "hidden_states": torch.randn(batch, channels, size, size),
        "sample": torch.randn(batch, channels, size, size),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.zeros(batch, dtype=torch.long),
        "encoder_hidden_states": torch.randn(batch, 77, text or 1),
        "pooled_projections": torch.randn(batch, config.get("pooled_projection_dim") or 1),
        "added_cond_kwargs": {
            "resolution": torch.full((batch, 2), 8.0 * size) if config.get("use_additional_conditions") else None,
            "aspect_ratio": torch.ones(batch, 1) if config.get("use_additional_conditions") else None,
        },
    }
    if config.get("norm_type") != "ada_norm_zero":
        del made["class_labels"]
    if text is None:
        del made["encoder_hidden_states"]
    return {name: value for name, value in made.items() if name in takes}
