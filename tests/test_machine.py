"""Random actions of users against an independent model of what is right: no wrong tensor, no error that is not ours.

The model is the eager oracle, one a generation.  A generation that runs alone and was announced must never be refused;
what may be refused is counted and told, so that refusing everything is no way out.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from attached import STEPS, Pipe, case, inputs, plan_for
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    rule,
    run_state_machine_as_test,
)
from models import relative, tensor_of
from oracle import Oracle
from torch import Tensor

import difa_fx
from difa_fx.errors import DifaError
from difa_fx.program import ProgramBuilder

TIGHT = 1e-4
TIMES = [800, 600, 400, 200, 0]
"""What a DDIMScheduler shows in ``STEPS`` steps."""

ROWS = {
    "one": ["full", "cached", "window+cfg", "full+cfg", "cached"],
    "two": ["full", "window+cfg", "full+cfg", "window", "cached"],
}
"""Two plans of the attached denoiser, whose batch holds two halves of guidance."""

SIDES = (8, 12)
WAYS = ("plain", "channels_last", "inference")
"""How a step is called: with other strides, under another mode."""

count = {"actions": 0, "calls": 0, "right": 0, "begun anew": 0, "refused": 0, "rightly refused": 0}


@dataclass(eq=False)
class Run:
    """A generation that a user runs.

    Attributes:
        denoiser: which of the two: 0 is attached, 1 is called by hand.
        scheduler: of an attached pipeline, or a copy; None by hand.
        first: the step that it begins with.
        sure: whether nothing about it may be refused.
        wrong: whether nothing about it may be taken: its steps are not the plan's, or its halves are not equal.
        pool: a thread of its own, or None.
        oracle: what is right.
    """

    denoiser: int
    scheduler: Any
    first: int
    sure: bool
    wrong: bool
    pool: ThreadPoolExecutor | None
    oracle: Oracle
    latents: Tensor
    labels: Tensor
    step: int = 0
    over: bool = False

    def __post_init__(self) -> None:
        self.step = self.first


class Users(RuleBasedStateMachine):
    """Two denoisers of one class, one attached to two pipelines and with guidance, one called by hand."""

    runs = Bundle("runs")

    made: Any = None

    @initialize()
    def begin(self) -> None:
        """The denoisers are compiled once and serve all examples."""
        if Users.made is None:
            bare = case().model
            plans = {name: plan_for(case(), rows, "cond_first") for name, rows in ROWS.items()}
            by_hand = plan_for(case()).replace(timesteps=TIMES)
            compiled = torch.compile(bare, backend="difa", options={"plan": by_hand, "compiler": "eager"})
            Users.made = plans, by_hand, [case().model for _ in range(2)], case().model, compiled
        self.plans, self.plan, self.eager, self.attached, self.bare = Users.made
        self.pipes = [Pipe(self.attached), Pipe(self.attached)]
        self.name, self.factor = "one", 1.0
        difa_fx.attach(self.pipes[0], self.plans[self.name], compiler="eager")
        difa_fx.attach(self.pipes[1])
        self.all: list[Run] = []
        self.by_hand: Run | None = None
        self.pools: list[ThreadPoolExecutor] = []

    def teardown(self) -> None:
        self.scale_weights(1 / self.factor)
        for pipe in self.pipes:
            difa_fx.detach(pipe)
        for pool in self.pools:
            pool.shutdown()
        difa_fx.reset(self.bare)

    def new_run(
        self,
        denoiser: int,
        scheduler: Any,
        seed: int,
        pairs: int,
        side: int,
        *,
        first: int = 0,
        sure: bool = True,
        wrong: bool = False,
        own: bool = False,
    ) -> Run:
        count["actions"] += 1
        plan = self.plan if denoiser else self.plans[self.name]
        full = plan.replace(methods=[["full"] * len(plan.sites), *plan.methods[1:]])
        pool = ThreadPoolExecutor(1) if own else None
        self.pools += [] if pool is None else [pool]
        latents, labels = inputs(seed, 2 * pairs, side)
        if not denoiser:
            latents = latents[:pairs].repeat(2, 1, 1, 1)
        oracle = Oracle(self.eager[denoiser], full)
        made = Run(denoiser, scheduler, first, sure, wrong, pool, oracle, latents, labels)
        self.all.append(made)
        return made

    @rule(
        target=runs,
        seed=st.integers(0, 50),
        pairs=st.sampled_from([1, 1, 2]),
        side=st.sampled_from(SIDES),
        first=st.sampled_from([0, 0, 0, 2]),
        which=st.sampled_from(["own", "other", "copy"]),
        thread=st.booleans(),
    )
    def begin_attached(self, seed: int, pairs: int, side: int, first: int, which: str, thread: bool) -> Run:
        pipe = self.pipes[which == "other"]
        scheduler = copy.deepcopy(pipe.scheduler) if which == "copy" or thread else pipe.scheduler
        run = self.new_run(0, scheduler, seed, pairs, side, first=first, sure=thread, own=thread)
        self.within(run, lambda: scheduler.set_timesteps(STEPS))
        return run

    @rule(seed=st.integers(0, 50), first=st.sampled_from([0, 2]), thread=st.booleans(), way=st.sampled_from(WAYS))
    def generate(self, seed: int, first: int, thread: bool, way: str) -> None:
        """A whole generation, as most are."""
        self.finish(self.begin_attached(seed, 1, SIDES[0], first, "own", thread), way)

    @rule(seed=st.integers(0, 50), reset=st.booleans(), way=st.sampled_from(WAYS))
    def generate_by_hand(self, seed: int, reset: bool, way: str) -> None:
        """The same without a pipeline."""
        self.finish(self.begin_by_hand(seed, 1, reset), way)

    @rule(target=runs, seed=st.integers(0, 50), fault=st.sampled_from(["steps", "halves"]))
    def begin_wrong(self, seed: int, fault: str) -> Run:
        """Another number of steps than the plan's, or latents that are not the same twice."""
        scheduler = copy.deepcopy(self.pipes[0].scheduler)
        run = self.new_run(0, scheduler, seed, 1, SIDES[0], sure=False, wrong=True, own=True)
        if fault == "halves":
            run.latents = inputs(seed, 2)[0]
        self.within(run, lambda: scheduler.set_timesteps(STEPS + 2 * (fault == "steps")))
        return run

    @rule(target=runs, seed=st.integers(0, 50), pairs=st.sampled_from([1, 1, 2]), reset=st.booleans())
    def begin_by_hand(self, seed: int, pairs: int, reset: bool) -> Run:
        run = self.new_run(1, None, seed, pairs, SIDES[0], sure=reset)
        self.unsure_by_hand()
        if reset:
            difa_fx.reset(self.bare)
        self.by_hand = run
        return run

    def unsure_by_hand(self) -> None:
        if self.by_hand is not None:
            self.by_hand.sure = False

    @rule(run=runs, way=st.sampled_from([*WAYS, "plain", "plain"]))
    def step(self, run: Run, way: str = "plain") -> None:
        count["actions"] += 1
        if run.over or run.step >= STEPS:
            return
        if run.denoiser and run is not self.by_hand:
            run.sure = False
            self.unsure_by_hand()
        try:
            received = self.called(run, way)
        except DifaError:
            count["refused" if not run.wrong else "rightly refused"] += 1
            run.over = True
            assert not run.sure, "a generation that nothing disturbs was refused"
            return
        got = received.clone()
        assert not run.wrong, "a call that fits no plan was taken"
        wanted = self.right(run)
        if not run.sure and relative(got, wanted) >= TIGHT:
            wanted = self.in_full(run)  # a scheduler, a reset or the first timestep said that a generation begins
            count["begun anew"] += 1
            run.over = True
        assert relative(got, wanted) < TIGHT, f"step {run.step} of a generation from {run.first}"
        count["right"] += 1
        with torch.inference_mode():
            received.fill_(float("nan"))  # a caller may write to what it receives
        change = 0.1 * got[:, :4]
        if not run.denoiser:  # guidance: both halves go on with one prediction
            change = (change.chunk(2)[0] + 0.5 * change.chunk(2)[1]).repeat(2, 1, 1, 1)
        run.latents = run.latents - change
        run.step += 1

    def called(self, run: Run, way: str) -> Tensor:
        """What the compiled denoiser gives."""
        count["calls"] += 1
        model = self.bare if run.denoiser else self.attached
        latents = run.latents.contiguous(memory_format=torch.channels_last) if way == "channels_last" else run.latents
        times = timesteps(run)
        return self.within(
            run,
            lambda: tensor_of(model(latents, timestep=times, class_labels=run.labels)),
            inference=way == "inference",
        ).clone()

    def right(self, run: Run) -> Tensor:
        """What the oracle gives; the first call of a generation is in full, whatever its row."""
        row = run.step if run.step > run.first else 0
        return tensor_of(run.oracle(row, run.latents, timestep=timesteps(run), class_labels=run.labels))

    def in_full(self, run: Run) -> Tensor:
        """What the denoiser gives without a plan."""
        with torch.no_grad():
            model = self.eager[run.denoiser]
            return tensor_of(model(run.latents, timestep=timesteps(run), class_labels=run.labels))

    @rule(run=consumes(runs), way=st.sampled_from(WAYS))
    def finish(self, run: Run, way: str) -> None:
        for _ in range(STEPS):
            self.step(run, way)

    @rule(run=consumes(runs))
    def leave(self, run: Run) -> None:
        """A callback raised an error: the generation does not go on."""
        count["actions"] += 1
        run.over = True

    @rule(run=runs)
    def interrupt(self, run: Run) -> None:
        """In the middle of a call; what is called after it is refused or right."""
        count["actions"] += 1
        if run.over or run.wrong or run.step >= STEPS:
            return
        run.sure = False
        if run.denoiser:
            self.unsure_by_hand()
        ran = ProgramBuilder.run_program

        def stopped(*args: Any) -> Any:
            ran(*args)
            raise KeyboardInterrupt

        with (
            mock.patch.object(ProgramBuilder, "run_program", stopped),
            contextlib.suppress(DifaError, KeyboardInterrupt),
        ):
            self.called(run, "plain")
        self.step(run)

    @rule(at=st.integers(0, STEPS - 1), denoiser=st.sampled_from([0, 1]))
    def probe(self, at: int, denoiser: int) -> None:
        """A call of nobody's generation, at a timestep that is nobody's next."""
        count["actions"] += 1
        mine = [run for run in self.all if run.denoiser == denoiser and run.pool is None]
        if any(run.step == at for run in mine):
            return  # what is documented as not to be told
        run = self.new_run(denoiser, None, 1000 + len(self.all), 1, SIDES[0], first=at, sure=False)
        for other in mine:
            other.sure = False
        self.step(run)
        run.over = True

    @rule(factor=st.sampled_from([2.0, 0.5]))
    def change_weights(self, factor: float) -> None:
        """As a low-rank adapter does that is fused in the middle of a generation."""
        count["actions"] += 1
        self.scale_weights(factor)

    def scale_weights(self, factor: float) -> None:
        self.factor *= factor
        with torch.no_grad():
            for model in (*self.eager, self.attached, self.bare):
                model.transformer_blocks[0].attn1.to_v.weight.mul_(factor)

    @rule(order=st.permutations([0, 1]))
    def detach_and_attach_one(self, order: list[int]) -> None:
        """What runs on the attached denoiser goes on or is refused."""
        count["actions"] += 1
        pipe = self.pipes[order[0]]
        difa_fx.detach(pipe)
        difa_fx.attach(pipe)
        self.unsure_attached()

    @rule(order=st.permutations([0, 1]), name=st.sampled_from(list(ROWS)))
    def attach_under_another_plan(self, order: list[int], name: str) -> None:
        """All state is dropped: what runs on the attached denoiser is over."""
        count["actions"] += 1
        for number in order:
            difa_fx.detach(self.pipes[number])
        assert self.attached._compiled_call_impl is None
        self.name = name
        difa_fx.attach(self.pipes[order[1]], self.plans[name], compiler="eager")
        difa_fx.attach(self.pipes[order[0]])
        for run in self.all:
            run.over |= not run.denoiser

    def unsure_attached(self) -> None:
        for run in self.all:
            run.sure &= bool(run.denoiser)

    def within(self, run: Run, do: Callable[[], Any], *, inference: bool = False) -> Any:
        """``do`` in the run's thread, without gradients."""

        def quiet() -> Any:
            # Dynamo's settings are a thread's own.
            with torch._dynamo.config.patch(recompile_limit=64), torch.inference_mode(inference), torch.no_grad():
                return do()

        return quiet() if run.pool is None else run.pool.submit(quiet).result()


def timesteps(run: Run) -> Tensor:
    """[B]."""
    return torch.full((len(run.labels),), TIMES[run.step])


def test_users_act_at_random(request: Any, record_property: Any, capsys: pytest.CaptureFixture[str]) -> None:
    thorough = request.config.getoption("--thorough")
    examples = settings(
        max_examples=500 if thorough else 25,
        stateful_step_count=50,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink] if thorough else [Phase.generate],
    )
    count.update(dict.fromkeys(count, 0))
    with torch._dynamo.config.patch(recompile_limit=64):
        run_state_machine_as_test(Users, settings=examples)
    record_property("count", dict(count))
    told = ", ".join(f"{number} {name}" for name, number in count.items())
    with capsys.disabled():
        sys.stdout.write(f"\n{told}\n")
    assert count["actions"] >= (20_000 if thorough else 1_000)
    assert count["right"] > 3 * (count["refused"] + count["begun anew"])
