"""Life in real pipelines: diffusers' loops, hooks, adapters, several resolutions, graph breaks, parts of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import compiled, make_plan, run
from models import Case, dit, relative, tensor_of, toy
from oracle import Oracle
from thorough import cases
from torch import nn
from toys import ToyAttention, ToyBlock
from zoo import NO_SITES, refused
from zoo_image_pipelines import IMAGE_PIPELINES, PipelineCase
from zoo_video_pipelines import VIDEO_PIPELINES

import difa_fx
from difa_fx.errors import ClockError, PlanError
from difa_fx.plan import Plan

TIGHT = 1e-4
PIPELINES: dict[str, Callable[[], PipelineCase]] = {**IMAGE_PIPELINES, **VIDEO_PIPELINES}
ROWS = ["full", "window", "cached", "full", "cached"]
CFG_ROWS = ["full", "window+cfg", "cached", "full+cfg", "window"]


def plan_for(found: PipelineCase, steps: int, *, rows: list[str] | None = None, window: int = 5) -> Plan:
    """A plan for a run of ``steps`` steps, with every method that the pipeline's guidance allows."""
    case = found.case
    two = found.calls_per_step == 2
    methods = rows or (CFG_ROWS if two or case.cfg_order else ROWS)
    calls = steps + found.extra_calls
    kept = [
        ["full" if not two and m in refused(found.name, site) else m for site in case.sites]
        for m in (methods * calls)[:calls]
    ]
    return make_plan(case, kept, window=window, cfg="cond_call_first" if two else case.cfg_order)


CORE = ("pixart_alpha", "sd3", "flux", "unet_ddim", "latte", "wan")


@pytest.mark.parametrize("name", cases([name for name in PIPELINES if name not in NO_SITES], core=CORE))
def test_a_real_pipeline_runs_under_a_plan(name: str) -> None:
    found = PIPELINES[name]()
    denoiser = getattr(found.pipe, found.denoiser_name)
    plain = found.run(4)
    full = plan_for(found, 4, rows=["full"])
    difa_fx.attach(found.pipe, full, compiler="eager")
    assert relative(found.run(4), plain) < 10 * TIGHT
    difa_fx.detach(found.pipe)
    difa_fx.attach(found.pipe, plan_for(found, 4), compiler="eager")
    first = found.run(4)
    assert torch.isfinite(first).all()
    assert relative(first, plain) > 1e-5
    assert torch.equal(found.run(4), first)
    assert sum(stats.state_bytes for stats in difa_fx.stats(denoiser)) == 0
    difa_fx.detach(found.pipe)
    assert torch.equal(found.run(4), plain)


def test_an_interrupted_run_leaves_nothing() -> None:
    found = IMAGE_PIPELINES["sd3"]()
    difa_fx.attach(found.pipe, plan_for(found, 4), compiler="eager")
    expected = found.run(4)

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 1
        return tensors

    cut = found.pipe(
        num_inference_steps=4, generator=torch.manual_seed(3), callback_on_step_end=stop, **found.kwargs
    ).images
    assert torch.isfinite(cut).all()
    assert torch.equal(found.run(4), expected)


def test_offload_hooks_do_not_get_in_the_way() -> None:
    """Accelerate's hooks are Python around the forward; on a machine without an accelerator they run all the same."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Move(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            Move.calls += 1
            return args, kwargs

    found = IMAGE_PIPELINES["sd3"]()
    difa_fx.attach(found.pipe, plan_for(found, 4), compiler="eager")
    expected = found.run(4)
    difa_fx.detach(found.pipe)
    add_hook_to_module(found.pipe.transformer, Move())
    difa_fx.attach(found.pipe, plan_for(found, 4), compiler="eager")
    assert relative(found.run(4), expected) < TIGHT
    assert Move.calls


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_are_part_of_the_denoiser(when: str) -> None:
    """A low-rank adapter on every projection: the sites are the same, and methods keep their contract."""
    peft = pytest.importorskip("peft")
    found = dit()
    plan = make_plan(found, ["full", "window+cfg", "cached", "full+cfg"], window=5)
    calls = found.generation(plan.steps)
    model = compiled(found, plan, "eager")
    if when == "after":
        plain = run(model, calls)
    config = peft.LoraConfig(
        r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"], lora_alpha=64
    )
    peft.inject_adapter_in_model(config, found.model)
    found.model.eval()
    got = run(model, calls)
    for ours, theirs in zip(got, Oracle(found.model, plan).run(calls), strict=True):
        assert relative(ours, tensor_of(theirs)) < TIGHT
    if when == "after":
        assert relative(got[0], plain[0]) > 1e-3
    ((args, kwargs),) = found.generation(1)
    (report,) = difa_fx.inspect(found.model, *args, **kwargs)
    assert tuple(site.path for site in report.sites) == found.sites


def test_resolutions_in_turn_have_each_their_state() -> None:
    """Automatic dynamic shapes: the second resolution makes Dynamo's graph symbolic, and every size has a runner."""
    found = toy(image=True, tokens=49)
    found.model.position = nn.Parameter(found.model.position[:1].clone())
    plan = make_plan(found, ["full", "cached", "window+cfg"], window=5)
    model = torch.compile(found.model, backend="difa", options={"plan": plan, "compiler": "eager"})
    counts = []
    for side in (7, 9, 11, 7, 9):
        generator = torch.Generator().manual_seed(side)
        calls = []
        for args, kwargs in found.generation(3):
            half = torch.randn(2, 4, side, side, generator=generator)
            calls.append(((torch.cat([half, half]), *args[1:]), kwargs))
        got = run(model, calls)
        for ours, theirs in zip(got, Oracle(found.model, plan).run(calls), strict=True):
            assert relative(ours, tensor_of(theirs)) < TIGHT, side
        counts.append(sum(bool(stats.sites) for stats in difa_fx.stats(model)))
    # The first size has a graph of its own, and is met again by the symbolic one.
    assert counts == [1, 2, 3, 4, 4]
    assert all(stats.state_bytes == 0 for stats in difa_fx.stats(model))


def test_fullgraph() -> None:
    found = dit()
    plan = make_plan(found, ["full", "cached"])
    model = torch.compile(found.model, backend="difa", options={"plan": plan, "compiler": "eager"}, fullgraph=True)
    calls = found.generation(2)
    for ours, theirs in zip(run(model, calls), Oracle(found.model, plan).run(calls), strict=True):
        assert relative(ours, tensor_of(theirs)) < TIGHT


class Broken(nn.Module):
    """A toy whose graph Dynamo has to break between its blocks."""

    def __init__(self, found: Case) -> None:
        super().__init__()
        self.toy = found.model

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        inner = self.toy
        angles = timestep.reshape(-1, 1) / 1000 * 2.0 ** torch.arange(8, device=x.device)
        embedding = inner.time(torch.cat([angles.sin(), angles.cos()], dim=-1)) + inner.label(condition)
        x = inner.embed(x) + inner.position
        # Written out: from the middle of a loop Dynamo cannot go on, and compiles each block by itself instead.
        x = inner.blocks[0](x, embedding, None)
        torch._dynamo.graph_break()
        x = inner.blocks[1](x, embedding, None)
        torch._dynamo.graph_break()
        return inner.out(inner.blocks[2](x, embedding, None))


def broken(found: Case) -> tuple[Case, Plan]:
    model = Broken(found).eval()
    case = Case("broken", model, found.draw, tuple(f"toy.{s}" for s in found.sites), (), 3, found.cfg_order, 48)
    return case, make_plan(case, ["full", "window", "cached", "full"], window=5)


def test_a_broken_graph_keeps_the_contract_in_every_part() -> None:
    found, plan = broken(toy(blocks=3))
    model = compiled(found, plan, "eager")
    calls = found.generation(plan.steps)
    for _ in range(2):
        for ours, theirs in zip(run(model, calls), Oracle(found.model, plan).run(calls), strict=True):
            assert relative(ours, tensor_of(theirs)) < TIGHT
    assert sum(bool(stats.sites) for stats in difa_fx.stats(model)) == 3
    assert sum(stats.state_bytes for stats in difa_fx.stats(model)) == 0
    assert relative(run(model, calls)[1], tensor_of(found.model(*calls[1][0]))) > 1e-3


def test_a_site_that_no_part_has_is_told_once_all_are_seen() -> None:
    found, plan = broken(toy(blocks=3))
    wrong = plan.replace(sites=(*plan.sites[:-1], "toy.blocks.7.attn"))
    model = compiled(found, wrong, "eager")
    (first, second) = found.generation(4)[:2]
    model(*first[0])
    with pytest.raises(PlanError, match=r"toy\.blocks\.7\.attn"):
        model(*second[0])


def test_a_block_by_itself_is_refused_with_the_way_to_do_it() -> None:
    found = dit()
    plan = make_plan(found, ["full", "cached"])
    found.model.transformer_blocks[0].compile(backend="difa", options={"plan": plan, "compiler": "eager"})
    args, kwargs = found.generation(1)[0]
    with pytest.raises(PlanError, match="one block of the denoiser by itself"):
        found.model(*args, **kwargs)


def test_repeated_blocks_compiled_by_diffusers_are_refused_alike() -> None:
    found = IMAGE_PIPELINES["flux"]()
    plan = plan_for(found, 4)
    found.pipe.transformer.compile_repeated_blocks(backend="difa", options={"plan": plan, "compiler": "eager"})
    with pytest.raises(PlanError, match="attach"):
        found.run(4)


def test_a_part_without_the_timestep_cannot_be_first() -> None:
    """One attention module by itself, broken off: nothing tells which step it is."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([ToyBlock(32, 2, 48, frames=1)])

        def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](x, e, None)
            torch._dynamo.graph_break()
            return x * 2

    assert isinstance(Part().blocks[0].attn, ToyAttention)
    plan = Plan(steps=2, sites=["blocks.0.attn"], methods=[["full"], ["cached"]], window=3, cfg=None)
    model = torch.compile(Part().eval(), backend="difa", options={"plan": plan, "compiler": "eager"})
    with pytest.raises(ClockError, match="several graphs"):
        model(torch.randn(2, 48, 32), torch.randn(2, 32))
