"""calibrate: a plan for a denoiser, by the paper's search or for a budget.

The story, top to bottom::

    check what was asked -> find the same calibration again, or what is left of it
        -> run the sampler with the denoiser shown to a driver, call by call
           (the greedy search in one generation; for a budget a profile, a few probes, then the solver)
        -> measure the plan against full attention, generation by generation in turn
        -> the plan, with all that was found in its provenance
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from difa_fx import plan_rules as rules
from difa_fx.asked import Asked, wrong
from difa_fx.budgeting import choose_for_budget
from difa_fx.checkpoint import Record, fingerprint_of, open_record
from difa_fx.drivers import Planned, Watched
from difa_fx.errors import CalibrationError
from difa_fx.findings import summary
from difa_fx.generation import Generation, drift, generation_of
from difa_fx.greedy import CANDIDATES, Greedy, least_and_most_calls
from difa_fx.guidance import call_order, guidance_order, is_guided, two_calls
from difa_fx.losses import loss as loss_named
from difa_fx.options import parse_options
from difa_fx.passes.find_attention import Attention
from difa_fx.plan import DEFAULT_WINDOW, CFGOrder, Method, Plan
from difa_fx.plan_io import thaw
from difa_fx.plan_words import Window, calls_per_step
from difa_fx.search import Backend, SearchSettings
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
        kwargs=_given(guidance_scale=guidance_scale, negative_prompt=negative_prompt) | dict(pipeline_kwargs or {}),
    )
    everything = asdict(asked) | {"samples": list(samples), "processes": workers.size} | generation.describe()
    goals = dict.fromkeys(("threshold", "target_speedup", "target_flops"), "profile")
    record, profile = (
        _shared_record(settings, generation.denoiser, workers, cache_dir, fresh=not resume)
        for settings in (everything, everything | goals)
    )
    if "plan" in record.found:
        return Plan.from_dict(record.found["plan"], where=str(record.path))
    shown = progress and workers.leads
    return _Calibration(asked, generation, workers, record, profile, shown, verify, len(samples)).run()


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


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


class _TwoCallsFoundError(Exception):
    """The sampler calls the denoiser twice a step; not for users."""

    def __init__(self, order: CFGOrder) -> None:
        self.order = order
        super().__init__(order)


@dataclass(slots=True)
class _Calibration:
    """One calibration on its way."""

    asked: Asked
    generation: Generation
    workers: Workers
    record: Record
    profile: Record
    progress: bool
    verify: int
    samples: int
    backend: Backend = field(init=False)
    order: CFGOrder | None = None

    def run(self) -> Plan:
        try:
            plan = self._plan()
        except _TwoCallsFoundError as found:
            self.order = found.order
            plan = self._plan()
        self.record.keep(plan=plan.to_dict())
        if self.progress and all(method is Method.FULL for row in plan.methods for method in row):
            self._explain(plan)
        return plan

    def _plan(self) -> Plan:
        self.backend = Backend(self._settle, self._watch)
        with self.generation.compiled(self.backend):
            if self.asked.search == "greedy":
                plan, findings = self._greedy()
            else:
                plan, findings = choose_for_budget(
                    self,
                    self.profile,
                    steps=self.asked.steps,
                    loss=loss_named(self.asked.loss),
                    target_speedup=self.asked.target_speedup,
                    target_flops=self.asked.target_flops,
                )
            plan = self._with_findings(plan, findings)
            return self._verified(plan) if self.verify else plan

    def generate(self, driver: Any, what: str) -> Any:
        """One generation with ``driver``; what the sampler gives."""
        result = self.generation.run(self.backend, driver)
        if self.backend.graph is None:
            raise CalibrationError(
                "the denoiser has no self-attention that a plan could change",
                where="calibrate",
                got=type(self.generation.denoiser).__name__,
                allowed="a denoiser with at least one site",
                todo="`difa inspect` lists every attention and why it is left alone",
            )
        expected = self.asked.steps * self.backend.graph.calls_per_step
        if self.backend.calls != expected:
            raise CalibrationError(
                "the sampler called the denoiser another number of times than there are steps",
                where=what,
                got=f"{self.backend.calls} calls",
                allowed=f"{expected} calls for {self.asked.steps} steps (num_inference_steps)",
                todo="pass the number of calls as num_inference_steps with a sampler of your own, or use a scheduler "
                "that calls the denoiser once a step, or, with guidance in two calls, twice",
            )
        return result

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[Any]:
        """A progress bar on stderr, if progress is shown."""
        with tqdm(total=total, desc=f"difa: {what}", disable=None if self.progress else True, leave=False) as bar:
            yield bar

    def say(self, text: str) -> None:
        """A line on stderr, if progress is shown."""
        if self.progress:
            tqdm.write(f"difa: {text}", file=sys.stderr)

    def make_plan(self, rows: Sequence[Sequence[Method]]) -> Plan:
        """A plan of ``rows`` for this denoiser and generation."""
        graph = self.backend.graph
        assert graph is not None
        times = self.backend.timesteps
        return Plan(
            steps=self.asked.steps,
            sites=tuple(site.path for site in graph.sites),
            methods=tuple(map(tuple, rows)),
            window=self.asked.window,
            cfg=graph.cfg,
            denoiser=type(self.generation.denoiser).__name__,
            timesteps=None if None in times else tuple(t for t in times if t is not None),
        )

    def _settle(self, attention: Attention, args: Sequence[Any]) -> tuple[SearchSettings, tuple[Method, ...]]:
        """Settle the CFG order and the candidates, at the first call."""
        asked, inputs = self.asked, attention.inputs
        known = self.order or rules.as_cfg(asked.cfg if asked.cfg != "auto" else None, "cfg")
        order = known if calls_per_step(known) == 2 else None
        if not order and asked.cfg and any(m.shares_cfg for m in asked.candidates) and is_guided(args, inputs):
            order = known or guidance_order(args, inputs, self._dynamic(args))
        order = self.workers.same(order)
        shared = asked.cfg is not None and order not in (None, "uncond_call_first")
        candidates = tuple(m for m in asked.candidates if shared or not m.shares_cfg)
        settings = SearchSettings(
            window=asked.window,
            cfg=order,
            compiler=asked.compiler,
            window_kernel=asked.window_kernel,
            inductor=asked.inductor,
        )
        return settings, candidates

    def _watch(self, attention: Attention, first: Sequence[Any], second: Sequence[Any]) -> None:
        """Begin again where a step proves to be two calls."""
        if self.asked.cfg in ("auto", None) and two_calls(first, second, attention.inputs):
            raise _TwoCallsFoundError("cond_call_first" if self.asked.cfg is None else call_order(first, second))

    def _dynamic(self, args: Sequence[Any]) -> list[int]:
        owned = {id(p) for p in (*self.generation.denoiser.parameters(), *self.generation.denoiser.buffers())}
        return [i for i, value in enumerate(args) if id(value) not in owned]

    def _greedy(self) -> tuple[Plan, dict[str, Any]]:
        assert self.asked.threshold is not None
        rows = [tuple(Method(m) for m in row) for row in self.record.found.get("rows", [])]
        with self.bar("search", self.asked.steps) as bar:

            def decided(step: int, number: int, method: Method) -> None:
                graph = self.backend.graph
                assert graph is not None
                if step == 0 and number == 0:
                    sizes = (self.asked.steps, len(graph.sites), len(graph.candidates))
                    least, most = (n * graph.calls_per_step for n in least_and_most_calls(*sizes))
                    self.say(f"the search takes {least:.0f} to {most:.0f} calls of the denoiser")
                bar.update(1 / len(graph.sites))
                bar.set_postfix_str(f"step {step} {graph.sites[number].path} {method}"[-48:])

            def finished(rows: Sequence[Sequence[Method]], losses: Sequence[Any]) -> None:
                self.record.keep(rows=[[m.value for m in row] for row in rows], losses=list(losses))

            driver = Greedy(
                threshold=self.asked.threshold,
                loss=loss_named(self.asked.loss),
                workers=self.workers,
                decided=decided,
                finished=finished,
                rows=rows,
                losses=list(self.record.found.get("losses", [])),
            )
            bar.update(len(rows))
            self.generate(driver, "search")
        graph = self.backend.graph
        assert graph is not None
        limits = [(i + 1) / len(graph.sites) * self.asked.threshold for i in range(len(graph.sites))]
        plan = self.make_plan(driver.rows)
        return plan, {"losses": driver.losses, "limits": limits, "calls": round(graph.work, 2)}

    def _with_findings(self, plan: Plan, findings: Mapping[str, Any]) -> Plan:
        asked = self.asked
        goals = _given(threshold=asked.threshold, target_speedup=asked.target_speedup, target_flops=asked.target_flops)
        calibration = {
            "search": asked.search,
            **goals,
            "loss": asked.loss,
            "candidates": [m.value for m in asked.candidates],
            "samples": self.samples,
            "seed": asked.seed,
            "fingerprint": self.record.fingerprint,
            "versions": {"torch": torch.__version__},
            **findings,
        }
        return plan.replace(provenance={"made by": "difa_fx.calibrate", "calibration": calibration})

    def _verified(self, plan: Plan) -> Plan:
        """``plan`` with what it measures against full attention, in generations that take turns."""
        full = plan.replace(methods=[[Method.FULL] * len(plan.sites)] * plan.steps)
        seconds: dict[str, list[float]] = {"full": [], "plan": []}
        steps: dict[str, list[list[float]]] = {"full": [], "plan": []}
        with self.bar("measure", 2 * self.verify) as bar:
            for _ in range(self.verify):
                latents, results = {}, {}
                for name, of in (("full", full), ("plan", plan)):
                    watched = Watched(Planned(of))
                    results[name] = self.generate(watched, "measure")
                    seconds[name].append(self.generation.seconds)
                    steps[name].append(watched.seconds)
                    latents[name] = watched.latents
                    bar.update()
        drifts = [self._mean(drift(b, a)) for a, b in zip(latents["full"], latents["plan"], strict=True)]
        typical = {name: statistics.median(values) for name, values in seconds.items()}
        measured = {"speed_up": typical["full"] / typical["plan"], "seconds": typical}
        final = drift(results["plan"], results["full"])
        if final is not None:
            measured["drift"] = self._mean(final)
        calibration = thaw(plan.provenance["calibration"]) | {
            "measured": measured,
            "drift": [value for value in drifts if value is not None],
            "step_seconds": {
                name: [statistics.median(times) for times in zip(*runs, strict=True)] for name, runs in steps.items()
            },
        }
        return plan.replace(provenance=thaw(plan.provenance) | {"calibration": self.workers.same(calibration)})

    def _mean(self, value: float | None) -> float | None:
        return None if value is None else float(self.workers.mean(torch.tensor(value, dtype=torch.float64)))

    def _explain(self, plan: Plan) -> None:
        warnings.warn(f"the calibrated plan is full attention everywhere\n{summary(plan)}", stacklevel=3)
