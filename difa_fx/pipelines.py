"""diffusers pipelines: compile their denoiser under a plan and listen to their scheduler.

The scheduler knows what a compiled graph cannot: that a generation begins, and which timesteps it will have.
:func:`attach` hears its ``set_timesteps`` and sets the step clock by it, so that an interrupted generation, another
number of steps or a second pipeline can never meet old state.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from difa_fx import registry
from difa_fx.errors import AttachError, OptionError, PlanError
from difa_fx.options import parse_options
from difa_fx.plan import Plan, as_plan

_DENOISERS = ("transformer", "unet", "denoiser", "model")
_MAX_SHOWN = 6


@dataclass(frozen=True, slots=True, eq=False)
class _Attachment:
    denoiser: nn.Module
    compiled_before: Any
    scheduler: Any
    heard_before: Any
    compiled_here: bool


_attachments: weakref.WeakKeyDictionary[Any, _Attachment] = weakref.WeakKeyDictionary()


def attach(pipe: Any, plan: object = None, *, mode: str | None = None, **options: Any) -> Any:
    """Compile a pipeline's denoiser with ``backend="difa"`` and let its scheduler set the step clock.

    A denoiser that was compiled with ``backend="difa"`` before stays as it is when no plan is given; only the
    scheduler is heard then.

    Args:
        pipe: a diffusers pipeline, or any object with a ``transformer`` or ``unet`` and a ``scheduler`` that has
            ``set_timesteps`` and ``timesteps``.
        plan: a path, dict or :class:`~difa_fx.plan.Plan`.
        mode: torch's own, for instance ``reduce-overhead``.
        options: the backend's other options.

    Returns:
        ``pipe``.

    Raises:
        AttachError: the object is no pipeline, is attached already, or has its denoiser spread over devices.
        PlanError: the plan is malformed; later, from ``set_timesteps``, that it has another number of steps.
        OptionError: an option is unknown or wrong.
    """
    if pipe in _attachments:
        raise AttachError(
            "this pipeline is attached already",
            where="difa_fx.attach",
            got=type(pipe).__name__,
            todo="call difa_fx.detach(pipe) first",
        )
    denoiser, scheduler = parts_of(pipe)
    _refuse_parallel(denoiser)
    before = denoiser._compiled_call_impl
    checked: Plan | None = None
    if plan is not None:
        checked = as_plan(plan)
        settings = {"plan": checked, "mode": mode, **options}
        parse_options(settings)
        denoiser.compile(backend="difa", options=settings)
    elif before is None:
        raise AttachError(
            "there is no plan, and the denoiser is not compiled",
            where="difa_fx.attach",
            got="plan=None",
            allowed="a plan, or a denoiser compiled with backend='difa'",
            todo="call difa_fx.attach(pipe, plan)",
        )
    heard_before = vars(scheduler).get("set_timesteps")
    _attachments[pipe] = _Attachment(denoiser, before, scheduler, heard_before, checked is not None)
    _listen(scheduler, denoiser, checked)
    return pipe


def _refuse_parallel(denoiser: Any) -> None:
    """Raise AttachError where diffusers spreads one sample's tokens or heads over devices.

    Its hooks stand between the layers then, Dynamo compiles part by part, and the parts cannot tell what they are.
    """
    if getattr(denoiser, "_parallel_config", None) is not None:
        raise AttachError(
            "the denoiser is spread over devices (enable_parallelism), and a plan cannot be rewritten through that",
            where="difa_fx.attach",
            got=type(denoiser._parallel_config).__name__,
            allowed="one whole denoiser on each device",
            todo="give each device the whole denoiser and a share of the prompts",
        )


def detach(pipe: Any) -> Any:
    """Undo :func:`attach`: the denoiser as it was before, the scheduler no longer heard, all state dropped.

    Raises:
        AttachError: the pipeline is not attached.
    """
    attachment = _attachments.pop(pipe, None)
    if attachment is None:
        raise AttachError(
            "this pipeline is not attached",
            where="difa_fx.detach",
            got=type(pipe).__name__,
            todo="call difa_fx.attach(pipe, plan) first",
        )
    vars(attachment.scheduler).pop("set_timesteps", None)
    if attachment.heard_before is not None:
        attachment.scheduler.set_timesteps = attachment.heard_before
    registry.release(attachment.denoiser)
    if attachment.compiled_here:
        attachment.denoiser._compiled_call_impl = attachment.compiled_before
    return pipe


def is_attached(pipe: Any) -> bool:
    """Whether ``pipe`` is attached."""
    return pipe in _attachments


def parts_of(pipe: Any) -> tuple[nn.Module, Any]:
    """A pipeline's denoiser and scheduler.

    Raises:
        AttachError: it has none.
    """
    for name in _DENOISERS:
        denoiser = getattr(pipe, name, None)
        if isinstance(denoiser, nn.Module):
            break
    else:
        raise AttachError(
            "the pipeline has no denoiser",
            where="difa_fx.attach",
            got=type(pipe).__name__,
            allowed=f"an attribute {', '.join(_DENOISERS)} that is a module",
            todo="compile your module with torch.compile(backend='difa') and call difa_fx.reset before a generation",
        )
    scheduler = getattr(pipe, "scheduler", None)
    if not callable(getattr(scheduler, "set_timesteps", None)):
        raise AttachError(
            "the pipeline has no scheduler to listen to",
            where="difa_fx.attach",
            got=type(scheduler).__name__,
            allowed="an object with set_timesteps and timesteps",
            todo="call difa_fx.reset(denoiser) before each generation instead",
        )
    return denoiser, scheduler


def _listen(scheduler: Any, denoiser: nn.Module, plan: Plan | None) -> None:
    """Put an instance attribute before the scheduler's own ``set_timesteps``."""
    original: Callable[..., Any] = scheduler.set_timesteps

    @functools.wraps(original)
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        timesteps = torch.as_tensor(scheduler.timesteps).detach().float().cpu().tolist()
        for expected in _plans(denoiser, plan):
            _check_steps(expected, timesteps)
        registry.begin(denoiser, timesteps, _training_steps(scheduler))
        return result

    scheduler.set_timesteps = set_timesteps


def _training_steps(scheduler: Any) -> float:
    """The steps of a scheduler's training; some denoisers are shown timesteps as a share of them.  0 when unknown."""
    count = getattr(getattr(scheduler, "config", None), "num_train_timesteps", 0)
    return float(count) if isinstance(count, (int, float)) else 0.0


def _plans(denoiser: nn.Module, plan: Plan | None) -> Sequence[Plan]:
    return [plan] if plan is not None else registry.plans(denoiser)


def _check_steps(plan: Plan, timesteps: Sequence[float]) -> None:
    """Raise PlanError when a generation would have another number of denoiser calls than the plan."""
    if len(timesteps) != plan.steps:
        raise PlanError(
            "the generation has another number of steps than the plan",
            where="scheduler.set_timesteps",
            got=f"{len(timesteps)} calls of the denoiser, at timesteps {_shown(timesteps)}",
            allowed=f"{plan.steps}",
            todo=f"pass num_inference_steps={plan.steps}, or use a plan made for {len(timesteps)} steps",
        )


def _shown(timesteps: Sequence[float]) -> str:
    head = ", ".join(f"{t:g}" for t in timesteps[:_MAX_SHOWN])
    return head + (", ..." if len(timesteps) > _MAX_SHOWN else "")


def load_denoiser(source: str, *, subfolder: str | None = None, random_weights: bool = False) -> nn.Module:
    """A diffusers denoiser from a folder or the hub, by the class its config names.

    Args:
        source: folder or hub name.
        subfolder: where in it the denoiser lies, for instance ``transformer``.
        random_weights: read the config alone.

    Raises:
        AttachError: there is no config of a diffusers model.
    """
    import diffusers

    try:
        config = diffusers.DiTTransformer2DModel.load_config(source, subfolder=subfolder)
        kind = getattr(diffusers, config["_class_name"])
        model = kind.from_config(config) if random_weights else kind.from_pretrained(source, subfolder=subfolder)
    except (OSError, KeyError, AttributeError) as error:
        raise AttachError(
            "no diffusers denoiser can be loaded",
            where=source,
            got=str(error).splitlines()[0],
            allowed="a folder or hub name with a config.json that names a diffusers model",
            todo="name the denoiser's own folder (or --subfolder transformer), or give module:function",
        ) from error
    return model.eval()  # type: ignore[no-any-return]


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
    import diffusers

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
        pipe: Any = diffusers.DiffusionPipeline
        return pipe.from_pretrained(source, **settings).to(place)
    except (OSError, ValueError, KeyError) as error:
        raise AttachError(
            "no diffusers pipeline can be loaded",
            where=source,
            got=str(error).splitlines()[0],
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
