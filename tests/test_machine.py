"""Random actions of users against an independent model of what is right: no wrong tensor, no error that is not ours.

The model is the eager oracle, one a generation.  A generation that runs alone and was announced must never be refused;
what may be refused is counted and told, so that refusing everything is no way out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from attached import STEPS, Pipe, case, inputs, plan_for
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, rule
from models import relative, tensor_of
from oracle import Oracle
from torch import Tensor

import difa_fx
from difa_fx.errors import DifaError

TIGHT = 1e-4
TIMES = [800, 600, 400, 200, 0]
"""What a DDIMScheduler shows in ``STEPS`` steps."""

count = {"calls": 0, "right": 0, "refused": 0}


@dataclass(eq=False)
class Run:
    """A generation that a user runs.

    Attributes:
        denoiser: which of the two.
        seed: of its latents and conditions.
        first: the step that it begins with.
        sure: whether nothing about it may be refused.
        pool: a thread of its own, or None.
    """

    denoiser: int
    seed: int
    batch: int
    first: int
    scheduler: Any
    sure: bool
    pool: ThreadPoolExecutor | None
    oracle: Oracle
    step: int = 0
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    labels: Tensor = field(default_factory=lambda: torch.empty(0))
    over: bool = False


class Users(RuleBasedStateMachine):
    """Two denoisers of one class with equal options, one attached to two pipelines, one called by hand."""

    runs = Bundle("runs")

    made: Any = None

    @initialize()
    def begin(self) -> None:
        """The denoisers are compiled once and serve all examples."""
        if Users.made is None:
            plan, bare = plan_for(case()), case().model
            compiled = torch.compile(bare, backend="difa", options={"plan": plan, "compiler": "eager"})
            Users.made = plan, [case().model for _ in range(2)], case().model, compiled
        self.plan, self.eager, attached, self.bare = Users.made
        self.pipe, self.other = Pipe(attached), Pipe(attached)
        difa_fx.attach(self.pipe, self.plan, compiler="eager")
        difa_fx.attach(self.other)
        self.by_hand: Run | None = None
        self.pools: list[ThreadPoolExecutor] = []

    def teardown(self) -> None:
        for pipe in (self.pipe, self.other):
            difa_fx.detach(pipe)
        for pool in self.pools:
            pool.shutdown()
        difa_fx.reset(self.bare)

    def new_run(
        self, denoiser: int, seed: int, batch: int, first: int, scheduler: Any, *, sure: bool, own: bool
    ) -> Run:
        full = self.plan.replace(methods=[["full"] * len(self.plan.sites), *self.plan.methods[1:]])
        pool = ThreadPoolExecutor(1) if own else None
        self.pools += [] if pool is None else [pool]
        run = Run(denoiser, seed, batch, first, scheduler, sure, pool, Oracle(self.eager[denoiser], full), step=first)
        run.latents, run.labels = inputs(seed, batch)
        return run

    @rule(
        target=runs,
        seed=st.integers(0, 50),
        batch=st.sampled_from([2, 2, 3]),
        first=st.sampled_from([0, 0, 0, 2]),
        which=st.sampled_from(["own", "other", "copy"]),
        thread=st.booleans(),
    )
    def begin_attached(self, seed: int, batch: int, first: int, which: str, thread: bool) -> Run:
        pipe = self.other if which == "other" else self.pipe
        scheduler = copy.deepcopy(pipe.scheduler) if which == "copy" or thread else pipe.scheduler
        run = self.new_run(0, seed, batch, first, scheduler, sure=thread, own=thread)
        self.within(run, lambda: scheduler.set_timesteps(STEPS))
        return run

    @rule(target=runs, seed=st.integers(0, 50), batch=st.sampled_from([2, 2, 3]), reset=st.booleans())
    def begin_by_hand(self, seed: int, batch: int, reset: bool) -> Run:
        run = self.new_run(1, seed, batch, 0, None, sure=reset, own=False)
        if self.by_hand is not None:
            self.by_hand.sure = False
        if reset:
            difa_fx.reset(self.bare)
        self.by_hand = run
        return run

    @rule(run=runs)
    def step(self, run: Run) -> None:
        if run.over or run.step >= STEPS:
            return
        model = self.bare if run.denoiser else self.pipe.transformer
        t = torch.full((run.batch,), TIMES[run.step])
        if run.denoiser and run is not self.by_hand:
            run.sure = False
            if self.by_hand is not None:
                self.by_hand.sure = False
        count["calls"] += 1
        try:
            received = self.within(run, lambda: tensor_of(model(run.latents, timestep=t, class_labels=run.labels)))
        except DifaError:
            count["refused"] += 1
            run.over = True
            assert not run.sure, "a generation that nothing disturbs was refused"
            return
        got = received.clone()
        row = run.step if run.step > run.first else 0
        wanted = tensor_of(run.oracle(row, run.latents, timestep=t, class_labels=run.labels))
        assert relative(got, wanted) < TIGHT, f"step {run.step} of a generation from {run.first}"
        count["right"] += 1
        received.fill_(float("nan"))  # a caller may write to what it receives
        run.latents = run.latents - 0.1 * got[:, :4]
        run.step += 1

    @rule(run=runs)
    def finish(self, run: Run) -> None:
        for _ in range(STEPS):
            self.step(run)

    @rule(run=consumes(runs))
    def leave(self, run: Run) -> None:
        run.over = True

    @rule(order=st.permutations([0, 1]))
    def detach_and_attach(self, order: list[int]) -> None:
        """State is dropped: what runs on the attached denoiser is over."""
        pipes = [self.pipe, self.other]
        difa_fx.detach(pipes[order[0]])
        difa_fx.attach(pipes[order[0]])

    def within(self, run: Run, do: Callable[[], Any]) -> Any:
        def quiet() -> Any:
            with torch.no_grad():
                return do()

        return quiet() if run.pool is None else run.pool.submit(quiet).result()


def test_users_act_at_random(request: Any, record_property: Any) -> None:
    thorough = request.config.getoption("--thorough")
    examples = settings(
        max_examples=400 if thorough else 8,
        stateful_step_count=50,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    count.update(dict.fromkeys(count, 0))
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Users, settings=examples)
    record_property("calls", dict(count))
    assert count["right"] > 3 * count["refused"]
