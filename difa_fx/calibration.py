"""calibrate: a plan for a denoiser, by the paper's search or for a budget.

The story, top to bottom::

    check what was asked -> find the same calibration again, or what is left of it
        -> run the sampler with the denoiser shown to a driver, call by call
           (the greedy search in one generation; for a budget a profile, a few probes, then the solver)
        -> measure the plan against full attention, generation by generation in turn
        -> the plan, with all that was found in its provenance
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from difa_fx import plan_rules as rules
from difa_fx.asked import Asked, given, wrong
from difa_fx.boundary import refuse_wrapped_weights
from difa_fx.calibration_job import CalibrationJob
from difa_fx.checkpoint import Record, fingerprint_of, open_record
from difa_fx.generation import generation_of
from difa_fx.greedy import CANDIDATES
from difa_fx.hardware import hardware, versions
from difa_fx.losses import loss as loss_named
from difa_fx.options import parse_options
from difa_fx.plan import DEFAULT_WINDOW, Method, Plan
from difa_fx.plan_words import Window
from difa_fx.workers import Workers, share_samples

_VERIFICATIONS = 2


def calibrate(
    target: Any,
    samples: Sequence[Any],
    *,
    num_inference_steps: int,
    threshold: float | None = None,
    target_speedup: float | None = None,
    target_flops: float | None = None,
    window: Window = DEFAULT_WINDOW,
    candidates: Sequence[Method | str] = CANDIDATES,
    loss: str = "paper",
    cfg: str | None = "auto",
    seed: int = 0,
    sampler: Callable[[nn.Module, Sequence[Any]], Any] | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    verify: int = _VERIFICATIONS,
    resume: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    compiler: str = "inductor",
    window_kernel: str = "auto",
    inductor: Mapping[str, Any] | None = None,
) -> Plan:
    """Find a plan for a denoiser.

    With ``threshold``: the greedy search of DiTFastAttn (arXiv 2406.08552, Algorithm 1).  With a target: the least
    error within a budget of seconds or of attention FLOPs (:mod:`difa_fx.budget`).  All samples go through one
    generation as one batch.  Under ``torchrun`` each process takes its share of them and all get the same plan.

    Dynamo's caches are cleared before and after, so other compiled code compiles again at its next call; the
    denoiser is left as it was.

    Args:
        target: a diffusers pipeline, not attached; or a bare denoiser, together with ``sampler``.
        samples: prompts, class labels or whatever else the pipeline takes first; a string is one of them.
        num_inference_steps: steps of the generation.
        threshold: the paper's delta, 0.025 to 0.15 there.
        target_speedup: how many times faster a whole generation is to be than under full attention.
        target_flops: fraction of the attention's operations to keep, projections not counted.
        window: tokens to either side of a query.
        candidates: methods to try, in order.
        loss: ``paper``, ``reference``, ``rse`` or ``ssim``; thresholds of one are not those of another.
        cfg: ``cond_first`` or ``uncond_first`` for two halves in one batch, ``cond_call_first`` or
            ``uncond_call_first`` for two calls a step, None for no ``+cfg`` methods, ``auto`` to tell from the inputs.
        seed: of the noise; sample i has its own.
        sampler: runs one generation of a bare denoiser: ``sampler(model, samples)``, seeded by torch's generator.
        guidance_scale: handed to the pipeline.
        negative_prompt: handed to the pipeline.
        pipeline_kwargs: anything else the pipeline is called with.
        verify: how many pairs of generations measure the plan against full attention; 0 for none.
        resume: go on with, or take, what an earlier calibration with these settings left.
        cache_dir: where that lies; ``$DIFA_CACHE_DIR`` or the user's cache folder when None.
        progress: show progress on stderr.
        compiler: ``inductor``, or ``aot_eager`` or ``eager`` to debug.
        window_kernel: see :class:`difa_fx.options.Options`.
        inductor: Inductor's own settings.

    Returns:
        The plan; ``plan.provenance["calibration"]`` holds losses, limits, predicted and measured figures.

    Raises:
        CalibrationError: nothing to calibrate on, nothing to compress, a loss that is not finite, a target that
            cannot be met.
        PlanFileError: findings cannot be written.
        OptionError: an option is unknown or wrong.
    """
    settings = parse_options({"compiler": compiler, "window_kernel": window_kernel, "inductor": inductor or {}})
    asked = Asked(
        steps=rules.as_count(num_inference_steps, "num_inference_steps"),
        threshold=threshold,
        target_speedup=target_speedup,
        target_flops=target_flops,
        window=rules.as_window(window),
        candidates=tuple(rules.as_method(m, f"candidates[{i}]") for i, m in enumerate(candidates)),
        loss=loss,
        cfg=cfg,
        seed=seed,
        compiler=settings.compiler,
        window_kernel=settings.window_kernel,
        inductor=settings.inductor,
    )
    loss_named(loss)
    if isinstance(samples, str):
        samples = [samples]
    if len(samples) == 0:
        raise wrong("there are no samples", "samples", list(samples), "one sample or more")
    workers, own = share_samples(samples)
    generation = generation_of(
        target,
        own,
        steps=asked.steps,
        seed=seed,
        sampler=sampler,
        kwargs=given(guidance_scale=guidance_scale, negative_prompt=negative_prompt) | dict(pipeline_kwargs or {}),
    )
    refuse_wrapped_weights(generation.denoiser)
    everything = asdict(asked) | {"samples": list(samples), "processes": workers.size} | generation.describe()
    everything |= {"versions": versions()} | ({"hardware": hardware()} if asked.search == "budget" else {})
    goals = dict.fromkeys(("threshold", "target_speedup", "target_flops"), "profile")
    record, profile = (
        _shared_record(settings, generation.denoiser, workers, cache_dir, fresh=not resume)
        for settings in (everything, everything | goals)
    )
    if "plan" in record.found:
        return Plan.from_dict(record.found["plan"], where=str(record.path))
    shown = progress and workers.leads
    return CalibrationJob(asked, generation, workers, record, profile, shown, verify, len(samples)).run()


def _shared_record(
    settings: Mapping[str, Any],
    denoiser: nn.Module,
    workers: Workers,
    folder: str | os.PathLike[str] | None,
    *,
    fresh: bool,
) -> Record:
    """The record of these settings: the first process writes it, all have what is in it."""
    fingerprint = workers.same(fingerprint_of(settings, denoiser))
    record = open_record(fingerprint, folder, fresh=fresh, readonly=not workers.leads)
    record.found = workers.same(record.found)
    return record
