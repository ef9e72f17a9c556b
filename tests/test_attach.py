"""One attachment a denoiser, any number of pipelines, and schedulers that are copied, replaced and used in turn."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from attached import STEPS, Pipe, case, generate, inputs, of, oracle_of, plan_for, stepwise
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from models import relative, tensor_of
from torch import Tensor, nn
from toys import ToyAttention

import difa_fx
from difa_fx.errors import AttachError, ClockError, DifaError, OptionError, PlanError
from difa_fx.plan import Plan

TIGHT = 1e-4


def attached(**settings: Any) -> Pipe:
    found = case()
    return difa_fx.attach(Pipe(found.model, **settings), plan_for(found), compiler="eager")


def expected(pipe: Pipe, seed: int, module: nn.Module | None = None, **part: int) -> Tensor:
    """What the oracle makes of a generation."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    denoise = oracle_of(module or case().model, plan_for(case()))
    *_, latents = stepwise(scheduler, denoise, seed, **part)
    return latents


def test_a_generation_is_the_oracles() -> None:
    pipe = attached()
    for seed in (1, 2):
        assert relative(generate(pipe, seed), expected(pipe, seed)) < TIGHT


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_image_to_image_runs_the_rows_of_its_timesteps_and_the_first_in_full(first: int) -> None:
    pipe = attached()
    generate(pipe, 3, last=2)
    assert relative(generate(pipe, 1, first=first), expected(pipe, 1, first=first)) < TIGHT
    assert relative(generate(pipe, 2), expected(pipe, 2)) < TIGHT


def test_a_plan_for_the_part_that_is_run() -> None:
    found = case()
    plan = plan_for(found, ["full", "cached", "window"])
    pipe = difa_fx.attach(Pipe(found.model), plan, compiler="eager")
    denoise, scheduler = oracle_of(case().model, plan), DDIMScheduler()
    *_, wanted = stepwise(scheduler, lambda step, *call: denoise(step - 2, *call), 1, first=2)
    assert relative(generate(pipe, 1, first=2), wanted) < TIGHT
    with pytest.raises(PlanError, match="another number of steps"):
        generate(pipe, 1, first=1)


def test_copies_of_a_scheduler_are_schedulers_of_their_own() -> None:
    before = DDIMScheduler.set_timesteps
    pipe = attached()
    for own in (copy.deepcopy(pipe.scheduler), copy.copy(pipe.scheduler), pickle.loads(pickle.dumps(pipe.scheduler))):
        own.set_timesteps(STEPS)
        assert len(own.timesteps) == STEPS
        assert len(pipe.scheduler.timesteps) == 1000
        assert vars(own).keys() == vars(DDIMScheduler()).keys()
        assert relative(generate(pipe, 1, scheduler=own), expected(pipe, 1)) < TIGHT
    difa_fx.detach(pipe)
    assert DDIMScheduler.set_timesteps is before


@pytest.mark.parametrize(
    "order", [(0, 1, 0, 1, 0, 1, 0, 1, 0, 1), (0, 0, 1, 1, 1, 0, 1, 0, 0, 1), (0, 1, 1, 1, 1, 1, 0, 0, 0, 0)]
)
def test_generations_that_take_turns_have_each_their_state(order: tuple[int, ...]) -> None:
    """As a callback that runs another generation, or a loop that serves two requests."""
    pipe = attached()
    runs = [stepwise(copy.deepcopy(pipe.scheduler), of(pipe), seed) for seed in (1, 2)]
    latents: dict[int, Tensor] = {}
    for which in map(int, order):
        latents[which] = next(runs[which])
    for which, seed in enumerate((1, 2)):
        assert relative(latents[which], expected(pipe, seed)) < TIGHT


def test_two_pipelines_take_turns() -> None:
    one = attached()
    other = difa_fx.attach(Pipe(one.transformer))
    runs = [stepwise(pipe.scheduler, of(pipe), seed) for pipe, seed in ((one, 1), (other, 2))]
    for _ in range(STEPS):
        latents = [next(run) for run in runs]
    for seed, got in zip((1, 2), latents, strict=True):
        assert relative(got, expected(one, seed)) < TIGHT


def test_threads_have_generations_of_their_own() -> None:
    pipe = attached()
    wanted = {seed: expected(pipe, seed) for seed in range(4)}
    found: dict[int, Any] = {}

    def work(seed: int) -> None:
        try:
            for _ in range(5):
                found[seed] = generate(pipe, seed, scheduler=copy.deepcopy(pipe.scheduler))
                assert relative(found[seed], wanted[seed]) < TIGHT
        except (DifaError, KeyError, AssertionError, RuntimeError) as error:
            found[seed] = error

    generate(pipe, 0)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [seed for seed, value in found.items() if not isinstance(value, Tensor)] == []


def test_what_a_thread_announced_before_another_made_the_first_call_is_known() -> None:
    pipe = attached()
    started, go = threading.Event(), threading.Event()
    found: list[Tensor] = []

    def work() -> None:
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(STEPS)
        started.set()
        go.wait(60)
        latents, labels = inputs(2)
        denoise = of(pipe)
        for step, t in enumerate(scheduler.timesteps):
            noise = denoise(step, latents, t.expand(len(labels)), labels)
            latents = scheduler.step(noise[:, :4], t, latents).prev_sample
        found.append(latents)

    thread = threading.Thread(target=work)
    thread.start()
    started.wait(60)
    generate(pipe, 1)
    go.set()
    thread.join()
    assert relative(found[0], expected(pipe, 2)) < TIGHT


def test_tasks_of_one_thread_have_generations_of_their_own() -> None:
    pipe = attached()

    async def one(seed: int) -> Tensor:
        made = []
        for latents in stepwise(copy.deepcopy(pipe.scheduler), of(pipe), seed):
            made.append(latents)
            await asyncio.sleep(0)
        return made[-1]

    async def both() -> list[Tensor]:
        return await asyncio.gather(one(1), one(2))

    for seed, got in zip((1, 2), asyncio.run(both()), strict=True):
        assert relative(got, expected(pipe, seed)) < TIGHT


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("ran", [False, True])
def test_a_scheduler_that_was_replaced_is_followed(kind: Any, ran: bool) -> None:
    pipe = attached()
    if ran:
        generate(pipe, 3)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    torch.manual_seed(0)
    got = generate(pipe, 1)
    torch.manual_seed(0)
    assert relative(got, expected(pipe, 1)) < TIGHT


def test_a_denoiser_that_was_replaced_is_an_error() -> None:
    pipe = attached()
    generate(pipe, 1)
    pipe.transformer = case().model
    with pytest.raises(AttachError, match="replaced after it was attached"):
        generate(pipe, 1)


@pytest.mark.parametrize("first_out", [0, 1])
def test_pipelines_are_detached_in_any_order(first_out: int) -> None:
    found = case()
    pipes = [Pipe(found.model), Pipe(found.model)]
    plain = generate(pipes[0], 1)
    difa_fx.attach(pipes[0], plan_for(found), compiler="eager")
    difa_fx.attach(pipes[1])
    planned = generate(pipes[1], 1)
    difa_fx.detach(pipes[first_out])
    rest = pipes[1 - first_out]
    assert torch.equal(generate(rest, 1), planned)
    difa_fx.detach(rest)
    assert torch.equal(generate(rest, 1), plain)
    assert found.model._compiled_call_impl is None
    assert relative(planned, plain) > 1e-3


def test_another_plan_on_one_denoiser_is_refused() -> None:
    pipe = attached()
    other = Pipe(pipe.transformer)
    with pytest.raises(AttachError, match="under another plan"):
        difa_fx.attach(other, plan_for(case(), ["full"] * STEPS), compiler="eager")
    difa_fx.attach(other, plan_for(case()), compiler="eager")


def test_a_compiled_denoiser_is_understood() -> None:
    found = case()
    plan = plan_for(found)
    planned = expected(Pipe(found.model), 1)
    pipe = Pipe(torch.compile(found.model, backend="eager"))
    wrapper = pipe.transformer
    difa_fx.attach(pipe, plan, compiler="eager")
    assert relative(generate(pipe, 1), planned) < TIGHT
    assert len(difa_fx.stats(pipe)) == 1
    difa_fx.detach(pipe)
    assert pipe.transformer is wrapper
    torch._dynamo.reset()
    pipe.transformer = torch.compile(found.model, backend="difa", options={"plan": plan, "compiler": "eager"})
    difa_fx.attach(pipe)
    assert relative(generate(pipe, 1), planned) < TIGHT


def test_every_denoiser_of_a_pipeline_runs_its_part_of_the_plan() -> None:
    """One for high noise, one for low; state does not go from the one to the other."""
    found, other = case(), case()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.1)
    eager = (copy.deepcopy(found.model), copy.deepcopy(other.model))
    pipe = difa_fx.attach(Pipe(found.model, transformer_2=other.model), plan_for(found), compiler="eager")

    def both(first: Any, second: Any) -> Any:
        return lambda step, *call: (first if step < 2 else second)(step, *call)

    for seed in (1, 2):
        *_, got = stepwise(pipe.scheduler, both(of(pipe), of(pipe, "transformer_2")), seed)
        oracles = [oracle_of(module, plan_for(found)) for module in eager]
        *_, wanted = stepwise(DDIMScheduler(), both(*oracles), seed)
        assert relative(got, wanted) < TIGHT
    difa_fx.detach(pipe)
    assert other.model._compiled_call_impl is None


class Hook:
    """Stands for accelerate's hooks, whose wrappers make Dynamo compile module by module."""


def offloaded(module: nn.Module) -> None:
    for part in module.modules():
        if part is not module and not list(part.children()):
            part._hf_hook = Hook()
            forward = part.forward
            part.forward = torch.compiler.disable(forward)


def test_sites_that_stop_running_are_an_error_with_its_cause() -> None:
    pipe = attached()
    generate(pipe, 1)
    offloaded(pipe.transformer)
    with pytest.raises(PlanError, match="hooks of accelerate"):
        generate(pipe, 1)


def test_not_strict_sites_that_stop_running_are_told_once() -> None:
    found = case()
    pipe = difa_fx.attach(Pipe(found.model), plan_for(found), compiler="eager", strict=False)
    generate(pipe, 1)
    pipe.transformer._compiled_call_impl._compiled = pipe.transformer._call_impl
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        generate(pipe, 1)
    assert [str(w.message) for w in told if "no site of the plan" in str(w.message)] == [str(told[0].message)]


def test_the_limit_of_recompilations_is_an_error_with_the_way_on() -> None:
    pipe = attached()
    generate(pipe, 1)
    latents, labels = inputs(1, batch=3)
    pipe.scheduler.set_timesteps(STEPS)
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        for given in (latents.transpose(2, 3), latents.to(memory_format=torch.channels_last)):
            with pytest.raises(PlanError, match="recompile_limit"):
                pipe.transformer(given, timestep=pipe.scheduler.timesteps[0].expand(3), class_labels=labels)


def test_what_users_hold_can_be_reset() -> None:
    found = case()
    plan = plan_for(found)
    options = {"plan": plan, "compiler": "eager"}
    method = torch.compile(found.model.forward, backend="difa", options=options)
    latents, labels = inputs(1)
    for target in (method, found.model, found.model.forward, Pipe(found.model)):
        difa_fx.reset(target)
        with torch.no_grad():
            got = tensor_of(method(latents, timestep=torch.full((2,), 900), class_labels=labels))
        assert (
            relative(got, tensor_of(found.model(latents, timestep=torch.full((2,), 900), class_labels=labels))) < TIGHT
        )
        assert len(difa_fx.stats(target)) == 1
    with pytest.raises(AttachError, match="no denoiser"):
        difa_fx.reset(len)


def test_options_that_were_edited_serve_the_next_denoiser_and_not_the_last() -> None:
    first, second = case(), case()
    options = {"plan": plan_for(first), "compiler": "eager"}
    one = torch.compile(first.model, backend="difa", options=options)
    latents, labels = inputs(1)

    def call(model: Any, t: int) -> Tensor:
        with torch.no_grad():
            return tensor_of(model(latents, timestep=torch.full((2,), t), class_labels=labels)).clone()

    call(one, 900)
    options["plan"] = plan_for(first, ["full"] * STEPS)
    two = torch.compile(second.model, backend="difa", options=options)
    for t in (900, 700, 500):
        assert relative(call(two, t), call(second.model, t)) < TIGHT
    with pytest.raises(OptionError, match="edited"):
        call(one, 700)


class EndsWithAttention(nn.Module):
    """Gives out what is cached."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.attn = nn.Linear(1, 16), ToyAttention(16, 2, 8)
        self.embed = nn.Linear(4, 16)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.attn(self.embed(x) + self.time(timestep.reshape(-1, 1) / 1000)[:, None], None)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_what_a_caller_receives_is_its_own(compiler: str) -> None:
    torch.manual_seed(0)
    plan = Plan(steps=3, sites=["attn"], methods=[["full"], ["cached"], ["cached"]], window=2, cfg=None)
    model = torch.compile(EndsWithAttention().eval(), backend="difa", options={"plan": plan, "compiler": compiler})
    x = torch.randn(2, 8, 4)
    with torch.no_grad():
        first = model(x, torch.full((2,), 900.0))
        kept = first.clone()
        for t in (700.0, 500.0):
            first.mul_(-1)
            first = model(x, torch.full((2,), t))
            assert torch.equal(first, kept)


def test_an_attached_call_without_its_scheduler_is_refused() -> None:
    pipe = attached()
    generate(pipe, 1)
    latents, labels = inputs(1)
    with pytest.raises(ClockError), torch.no_grad():
        pipe.transformer(latents, timestep=torch.full((2,), 123), class_labels=labels)


def test_an_euler_scheduler_shows_its_timesteps() -> None:
    found = case()
    pipe = difa_fx.attach(Pipe(found.model, EulerDiscreteScheduler()), plan_for(found), compiler="eager")
    assert relative(generate(pipe, 1), expected(pipe, 1)) < TIGHT
