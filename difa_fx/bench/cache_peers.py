"""The caches that come with diffusers: what they can run on, and how they are set here.

They change the numbers in ways of their own: FirstBlockCache leaves out all blocks but the first where that one's
output hardly moved, PyramidAttentionBroadcast (PAB) and FasterCache reuse attention outputs on a fixed beat.  Their
settings are stated beside their times, and so is how far they end from the uncompressed run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from difa_fx.bench.sampling import Denoiser
from difa_fx.bench.settings import FIRST_BLOCK_THRESHOLD
from difa_fx.bench.subject import Subject

SKIP_RANGE: Final = 2
PAB_TIMESTEPS: Final = (100, 800)
FASTER_TIMESTEPS: Final = (-1, 681)
UNCONDITIONAL_SKIP_RANGE: Final = 5
UNCONDITIONAL_TIMESTEPS: Final = (-1, 641)


@dataclass(slots=True)
class Now:
    """The timestep that a hook asks for."""

    timestep: int = 0


@dataclass(frozen=True, slots=True)
class CachePeer:
    """One of diffusers' caches.

    Attributes:
        setting: how it is set, for people, given FirstBlockCache's threshold.
        refusal: why it cannot run on a subject; None where it can.
        apply: puts its hooks into a model; takes that threshold, too.
    """

    setting: Callable[[float], str]
    refusal: Callable[[Subject], str | None]
    apply: Callable[[Subject, nn.Module, Now, float], None]


def cached(
    peer: CachePeer,
    subject: Subject,
    model: nn.Module,
    compiled: Callable[[nn.Module], Any] | None,
    *,
    threshold: float = FIRST_BLOCK_THRESHOLD,
) -> Denoiser:
    """``model`` with a cache's hooks; eagerly, or as ``compiled`` compiles it."""
    from diffusers.hooks.hooks import HookRegistry
    from diffusers.models.cache_utils import CacheMixin

    now = Now()
    peer.apply(subject, model, now, threshold)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    run: Any = model if compiled is None else compiled(model)
    # CacheMixin's own method: not every denoiser derives from it, but all that it needs is a registry of hooks.
    in_context: Any = CacheMixin.cache_context
    context = ["cond"]

    def tell(step: int, call: int, timestep: int) -> None:
        now.timestep = timestep
        context[0] = "cond" if call == 0 else "uncond"

    def denoise(**arguments: Any) -> Any:
        with in_context(model, context[0]):
            return run(**arguments)

    return Denoiser(denoise, registry.reset_stateful_hooks, tell)


def _first_block_refusal(subject: Subject) -> str | None:
    if len(subject.sites) < 2:
        return "it needs two blocks"
    last: Any = subject.model.get_submodule(subject.sites[-1].rpartition(".")[0])
    if getattr(last, "context_pre_only", False):
        return "it keeps the text that the last block hands out, and here that hands out none"
    return None


def _first_block(subject: Subject, model: nn.Module, now: Now, threshold: float) -> None:
    from diffusers.hooks.first_block_cache import FirstBlockCacheConfig, apply_first_block_cache

    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=threshold))


def _pab_refusal(subject: Subject) -> str | None:
    if subject.calls_per_step == 2:
        return "it keeps one output a module, and guidance calls this denoiser twice a step"
    return None


def _pab(subject: Subject, model: nn.Module, now: Now, threshold: float) -> None:
    from diffusers.hooks.pyramid_attention_broadcast import (
        PyramidAttentionBroadcastConfig,
        apply_pyramid_attention_broadcast,
    )

    apply_pyramid_attention_broadcast(
        model,
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=SKIP_RANGE,
            spatial_attention_timestep_skip_range=PAB_TIMESTEPS,
            current_timestep_callback=lambda: now.timestep,
        ),
    )


def _faster_refusal(subject: Subject) -> str | None:
    if subject.calls_per_step == 2:
        return "it parts a batch of two halves of guidance, and guidance calls this denoiser twice a step"
    if subject.cfg == "cond_first":
        return "it takes the second half of the batch for the conditional one, and here that is the first"
    return None


def _faster(subject: Subject, model: nn.Module, now: Now, threshold: float) -> None:
    from diffusers.hooks.faster_cache import FasterCacheConfig, apply_faster_cache

    halved = [name for name, value in subject.conditions[0].items() if hasattr(value, "shape")]
    apply_faster_cache(
        model,
        FasterCacheConfig(
            spatial_attention_block_skip_range=SKIP_RANGE,
            spatial_attention_timestep_skip_range=FASTER_TIMESTEPS,
            unconditional_batch_skip_range=UNCONDITIONAL_SKIP_RANGE,
            unconditional_batch_timestep_skip_range=UNCONDITIONAL_TIMESTEPS,
            attention_weight_callback=lambda _: 0.5,
            tensor_format="BCHW",
            is_guidance_distilled=subject.cfg is None,
            current_timestep_callback=lambda: now.timestep,
            _unconditional_conditional_input_kwargs_identifiers=["hidden_states", "timestep", *halved],
        ),
    )


def _first_block_setting(threshold: float) -> str:
    return f"FirstBlockCache, threshold {threshold:g}"


def _pab_setting(threshold: float) -> str:
    low, high = PAB_TIMESTEPS
    return f"PAB, every {SKIP_RANGE}nd self-attention between timesteps {low} and {high}"


def _faster_setting(threshold: float) -> str:
    return (
        f"FasterCache, every {SKIP_RANGE}nd self-attention below timestep {FASTER_TIMESTEPS[1]}, the unconditional "
        f"half every {UNCONDITIONAL_SKIP_RANGE}th step below {UNCONDITIONAL_TIMESTEPS[1]}"
    )


CACHE_PEERS: Final[Mapping[str, CachePeer]] = {
    "fbcache": CachePeer(_first_block_setting, _first_block_refusal, _first_block),
    "pab": CachePeer(_pab_setting, _pab_refusal, _pab),
    "fastercache": CachePeer(_faster_setting, _faster_refusal, _faster),
}
"""Name to peer."""
