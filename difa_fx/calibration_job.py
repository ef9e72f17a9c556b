"""One calibration on its way: generations run with a driver, the search that was asked for, and what it found."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from difa_fx import plan_rules as rules
from difa_fx.asked import Asked, given
from difa_fx.budgeting import choose_for_budget
from difa_fx.checkpoint import Record
from difa_fx.drivers import Planned
from difa_fx.errors import CalibrationError
from difa_fx.findings import summary
from difa_fx.generation import Generation
from difa_fx.greedy import Greedy, least_and_most_calls
from difa_fx.guidance import call_order, guidance_order, is_guided, two_calls
from difa_fx.hardware import device_of, versions
from difa_fx.losses import loss as loss_named
from difa_fx.passes.find_attention import Attention
from difa_fx.plan import CFGOrder, Method, Plan
from difa_fx.plan_words import calls_per_step
from difa_fx.search import Backend, SearchSettings
from difa_fx.verification import Measured, Rows, measure
from difa_fx.workers import Workers


class _TwoCallsFoundError(Exception):
    """The sampler calls the denoiser twice a step; not for users."""

    def __init__(self, order: CFGOrder) -> None:
        self.order = order
        super().__init__(order)


Methods = tuple[tuple[Method, ...], ...]


@dataclass(slots=True)
class CalibrationJob:
    """One calibration on its way.

    Attributes:
        asked: what for.
        generation: what is run, again and again alike.
        workers: who shares the samples.
        record: where the plan, and the greedy search's rows, are kept.
        profile: where the profile is kept.
        progress: whether progress is shown.
        verify: pairs of generations that measure the plan.
        samples: how many there are, on all workers together.
        backend: shows the denoiser to a driver.
        order: of the CFG calls, once a step proved to be two.
    """

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
    _planned: dict[Methods, Planned] = field(default_factory=dict)
    _measured: dict[Methods, Measured] = field(default_factory=dict)

    def run(self) -> Plan:
        """The plan, also kept in the record."""
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
        self.backend = Backend(self._settle, self._watch, compiler=self.asked.compiler, inductor=self.asked.inductor)
        self._planned.clear()
        self._measured.clear()
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
                    pairs=self.verify,
                )
            if self.verify:
                findings = {**findings, **self.measured(plan, self.verify).to_dict()}
            return self._with_findings(plan, findings)

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

    def planned(self, rows: Rows) -> Planned:
        """What runs a plan of ``rows``; the same one whenever it is asked for."""
        key = tuple(map(tuple, rows))
        if key not in self._planned:
            self._planned[key] = Planned(self.make_plan(rows))
        return self._planned[key]

    def measured(self, plan: Plan, pairs: int) -> Measured:
        """What ``plan`` does beside full attention; measured once."""
        if plan.methods not in self._measured:
            self._measured[plan.methods] = measure(self, plan, pairs)
        return self._measured[plan.methods]

    def _settle(self, attention: Attention, args: Sequence[Any]) -> tuple[SearchSettings, tuple[Method, ...]]:
        """Settle the CFG order and the candidates, at the first call."""
        asked, inputs = self.asked, attention.inputs
        known = self.order or rules.as_cfg(asked.cfg if asked.cfg != "auto" else None, "cfg")
        order = known if calls_per_step(known) == 2 else None
        shares = asked.cfg is not None and any(m.shares_cfg for m in asked.candidates)
        if not order and shares and inputs.doubled:
            order = known  # the inputs do not show which half is which
        elif not order and shares and is_guided(args, inputs):
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
        goals = given(threshold=asked.threshold, target_speedup=asked.target_speedup, target_flops=asked.target_flops)
        calibration = {
            "search": asked.search,
            **goals,
            "loss": asked.loss,
            "candidates": [m.value for m in asked.candidates],
            "samples": self.samples,
            "seed": asked.seed,
            "fingerprint": self.record.fingerprint,
            "versions": versions(),
            **self._conditions(),
            **findings,
        }
        return plan.replace(provenance={"made by": "difa_fx.calibrate", "calibration": calibration})

    def _conditions(self) -> dict[str, Any]:
        """Where the plan is known to be right; see :mod:`difa_fx.elsewhere`."""
        graph = self.backend.graph
        assert graph is not None
        return {
            "tokens": {site.path: site.shape.tokens for site in graph.sites},
            "latents": graph.latents_shape,
            "scheduler": self.generation.scheduler,
            "device": device_of(graph.device),
        }

    def _explain(self, plan: Plan) -> None:
        warnings.warn(f"the calibrated plan is full attention everywhere\n{summary(plan)}", stacklevel=3)
