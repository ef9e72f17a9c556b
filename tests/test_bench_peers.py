"""The peers compute what they say: DiTFastAttn by processors gives difa's numbers, and refusals are true."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import difa_fx
from difa_fx.bench.cache_peers import CACHE_PEERS, cached
from difa_fx.bench.children import compiled_by
from difa_fx.bench.dynamo import apart, listening, room
from difa_fx.bench.peers import HookedPlan, PlannedProcessor, hooked
from difa_fx.bench.plan_race import twin
from difa_fx.bench.sampling import Denoiser, generate, relative_l1
from difa_fx.bench.settings import Size
from difa_fx.bench.shapes import SHAPES, make_subject
from difa_fx.bench.subject import Subject, timesteps
from difa_fx.errors import BenchmarkError
from difa_fx.plan import Method, Plan


@functools.cache
def lively(shape: str) -> Subject:
    """A tiny denoiser whose attention is not flat, so that a window or a wrong half shows."""
    subject = make_subject(Size(shape=shape, tiny=True))
    for layer in subject.model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.mul_(2.0)
    return subject


def plan_of(subject: Subject, rows: list[list[str]], window: int = 5) -> Plan:
    shown = tuple(subject.shown(t) for t in timesteps(len(rows)))
    return Plan(steps=len(rows), sites=subject.sites, methods=rows, window=window, cfg=subject.cfg, timesteps=shown)


def both(subject: Subject, plan: Plan) -> tuple[Any, Any]:
    """The last latents by processors, and by difa."""
    torch._dynamo.reset()
    by_hooks = generate(subject, hooked(subject, twin(subject.model), plan, None), plan.steps)
    compiled = compiled_by("difa", subject, plan, "eager", None)
    return by_hooks, generate(subject, Denoiser(compiled), plan.steps)


FIXED = [
    ["full", "full"],
    ["window", "cached"],
    ["cached", "full+cfg"],
    ["full+cfg", "window"],
    ["window+cfg", "window+cfg"],
    ["window", "cached"],
]


def rows_for(subject: Subject) -> list[list[str]]:
    return FIXED if subject.cfg is not None else [[m.partition("+")[0] for m in row] for row in FIXED]


@pytest.mark.parametrize("shape", SHAPES)
def test_processors_and_difa_give_the_same_latents(shape):
    subject = lively(shape)
    plan = plan_of(subject, rows_for(subject))
    by_hooks, by_difa = both(subject, plan)
    distance = relative_l1(by_hooks, by_difa)
    plain = generate(subject, Denoiser(subject.model), plan.steps)
    changed = relative_l1(by_difa, plain)
    assert distance is not None and distance < 1e-5
    assert changed is not None and changed > 1e-3, "the plan changes something, so equality means something"


@pytest.mark.parametrize("shape", ["dit-xl-2-512", "wan-1.3b-480p"])
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_processors_follow_any_plan(shape, data):
    subject = lively(shape)
    column = st.lists(st.sampled_from([m.value for m in Method]), min_size=4, max_size=4)
    columns = [["full", *data.draw(column)] for _ in subject.sites]
    plan = plan_of(subject, [list(row) for row in zip(*columns, strict=True)], window=data.draw(st.integers(0, 70)))
    distance = relative_l1(*both(subject, plan))
    assert distance is not None and distance < 1e-5


def test_a_twin_shares_weights_and_nothing_else():
    subject = lively("dit-xl-2-512")
    other = twin(subject.model)
    assert all(a is b for a, b in zip(subject.model.parameters(), other.parameters(), strict=True))
    before = subject.model.transformer_blocks[0].attn1.processor
    HookedPlan(subject, other, plan_of(subject, rows_for(subject)))
    assert isinstance(other.transformer_blocks[0].attn1.processor, PlannedProcessor)
    assert subject.model.transformer_blocks[0].attn1.processor is before


def test_processors_keep_what_is_read_and_forget_it():
    subject = lively("dit-xl-2-512")
    plan = plan_of(subject, [["full", "full"], ["full", "cached"], ["window", "full"]])
    denoiser = hooked(subject, twin(subject.model), plan, None)
    assert denoiser.kept is not None
    kept: list[int] = []

    def tell(step: int, call: int, timestep: int) -> None:
        kept.append(denoiser.kept())
        denoiser.tell(step, call, timestep)

    generate(subject, Denoiser(denoiser.call, denoiser.begin, tell), plan.steps)
    output = 2 * 64 * 16 * 4  # B N E floats; a residual is as large
    assert kept == [0, output, 2 * output], "the output of site 1; then the residual of site 0, too"
    denoiser.begin()
    assert denoiser.kept() == 0


def test_an_unknown_attention_module_is_refused():
    subject = lively("dit-xl-2-512")
    other = twin(subject.model)
    other.transformer_blocks[0].attn1 = nn.Identity()
    with pytest.raises(BenchmarkError, match="Identity"):
        HookedPlan(subject, other, plan_of(subject, rows_for(subject)))


def test_processors_run_under_a_compiler_and_its_work_is_counted():
    subject = lively("dit-xl-2-512")
    plan = plan_of(subject, rows_for(subject))
    eager = generate(subject, hooked(subject, twin(subject.model), plan, None), plan.steps)
    with room(64) as limit, listening() as heard:
        compiled = functools.partial(torch.compile, backend="eager", dynamic=False, **apart(limit))
        again = generate(subject, hooked(subject, twin(subject.model), plan, compiled), plan.steps)
    distance = relative_l1(again, eager)
    assert distance is not None and distance < 1e-5
    assert heard.graphs >= 4, "a plan whose rows differ is compiled again and again"
    assert torch.compiler.config.recompile_limit == limit


def test_a_frame_that_dynamo_gives_up_on_is_counted():
    def switched(x: torch.Tensor, number: int) -> torch.Tensor:
        return x + number if number % 2 else x * number

    with listening() as heard:
        compiled = torch.compile(switched, backend="eager", dynamic=False)
        for number in range(10):
            compiled(torch.ones(2), number)
    assert heard.gave_up >= 1


def runs(name: str, subject: Subject, steps: int = 8) -> float | None:
    """How far a cache ends from the uncompressed run."""
    denoiser = cached(CACHE_PEERS[name], subject, twin(subject.model), None)
    plain = generate(subject, Denoiser(subject.model), steps)
    first = generate(subject, denoiser, steps)
    again = generate(subject, denoiser, steps)
    assert torch.equal(first, again), "nothing is left of a generation"
    return relative_l1(first, plain)


@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")  # diffusers' own, in FasterCache
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CACHE_PEERS)
def test_caches_of_diffusers_run_where_they_are_not_refused(name, shape):
    subject = lively(shape)
    if CACHE_PEERS[name].refusal(subject) is not None:
        pytest.skip("refused; see the test below")
    distance = runs(name, subject)
    assert distance is not None
    if name != "fbcache":  # with these weights its threshold may never be met
        assert distance > 0, "it reuses something"


def test_refusals_are_the_ones_that_are_known():
    refused = {
        (name, shape)
        for name, peer in CACHE_PEERS.items()
        for shape in SHAPES
        if peer.refusal(lively(shape)) is not None
    }
    assert refused == {
        ("fbcache", "sd3-medium-1024"),
        ("pab", "wan-1.3b-480p"),
        ("fastercache", "wan-1.3b-480p"),
        ("fastercache", "dit-xl-2-512"),
    }


def test_first_block_cache_would_fail_without_text_at_the_end():
    with pytest.raises(TypeError, match="NoneType"):
        runs("fbcache", lively("sd3-medium-1024"))


def test_faster_cache_would_take_the_wrong_half():
    """Why it is refused where the conditional half is the first: it is the one that is left out."""
    subject = lively("dit-xl-2-512")
    denoiser = cached(CACHE_PEERS["fastercache"], subject, twin(subject.model), None)
    seen: list[torch.Tensor] = []
    model = denoiser.begin.__self__._module_ref  # type: ignore[attr-defined]
    model.pos_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.transformer_blocks[0].norm1.emb.class_embedder.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    generate(subject, denoiser, 8)
    labels = [value for value in seen if value.ndim == 1 and len(value) == 1]
    assert labels and all(int(value) == 1000 for value in labels), "alone it computes the label of no class"


def test_pab_would_mix_the_calls_of_guidance():
    """Why it is refused where guidance is two calls: the second gets what the first computed."""
    subject = lively("wan-1.3b-480p")
    denoiser = cached(CACHE_PEERS["pab"], subject, twin(subject.model), None)
    denoiser.begin()
    latents = subject.noise
    for call in (0, 1):
        denoiser.tell(0, call, 500)
        denoiser.call(**subject.arguments(latents, 500, call))
    registry = denoiser.begin.__self__  # type: ignore[attr-defined]
    hooks = [m._diffusers_hook for m in registry._module_ref.modules() if hasattr(m, "_diffusers_hook")]
    states = [hook.state for found in hooks for hook in found.hooks.values() if hasattr(hook, "state")]
    assert states and all(state.iteration == 2 for state in states), "one count and one cache for both"


def test_difa_and_peers_leave_the_denoiser_as_it_was():
    subject = lively("sd3-medium-1024")
    before = generate(subject, Denoiser(subject.model), 3)
    both(subject, plan_of(subject, rows_for(subject)))
    runs("pab", subject)
    difa_fx.reset(subject.model)
    assert torch.equal(generate(subject, Denoiser(subject.model), 3), before)
