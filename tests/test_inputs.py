"""What a denoiser's inputs mean, and graphs that lack some of them or write to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from compiled import compiled, make_plan, run, runner
from models import Case, relative, tensor_of, toy
from oracle import Oracle
from test_passes import captured, found_in
from torch import Tensor, nn

import difa_fx
from difa_fx.errors import CFGError, GraphError
from difa_fx.passes.inputs import DenoiserInputs, denoiser_inputs

TIGHT = 5e-5
ROWS = ["full", "window", "cached", "full"]


def around(forward: Callable[..., Any], **options: Any) -> Case:
    """A toy inside another forward, whose first argument is the module that holds it as ``toy``."""
    found = toy(**options)
    model = type("Around", (nn.Module,), {"forward": forward})()
    model.toy = found.model
    return replace(found, model=model.eval(), sites=tuple(f"toy.{path}" for path in found.sites))


def _ends_after_a_table(self: Any, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
    table = torch.arange(48).float()[:, None] / 48
    torch._dynamo.graph_break()
    return self.toy(x + table, timestep, condition)


def _writes_what_a_part_made(self: Any, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
    scaled = x * 2
    torch._dynamo.graph_break()
    scaled[:, 0] *= 0.5
    scaled += 1
    return self.toy(scaled, timestep, condition) + scaled


def _writes_the_latents(self: Any, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
    x.mul_(0.5)
    return self.toy(x, timestep, condition)


@pytest.mark.parametrize("forward", [_ends_after_a_table, _writes_what_a_part_made])
def test_parts_without_inputs_and_parts_that_write_to_them(forward: Callable[..., Any]) -> None:
    found = around(forward)
    plan = make_plan(found, ROWS, window=5)
    calls = found.generation(plan.steps)
    model = compiled(found, plan)
    for _ in range(2):
        for ours, theirs in zip(run(model, calls), Oracle(found.model, plan).run(calls), strict=True):
            assert relative(ours, tensor_of(theirs)) < TIGHT


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_what_is_written_to_an_input_is_there_for_the_caller(compiler: str) -> None:
    found = around(_writes_the_latents)
    model = compiled(found, make_plan(found, ["full", "cached"]), compiler)
    for args, _ in found.generation(2):
        mine, theirs = args[0].clone(), args[0].clone()
        with torch.no_grad():
            expected = found.model(theirs, *args[1:]) if args[1][0] > 900 else None
            got = model(mine, *args[1:])
        assert torch.equal(mine, args[0] * 0.5)
        if expected is not None:
            assert relative(got, expected) < TIGHT


def test_a_buffer_that_is_written_is_an_error() -> None:
    class Counts(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x, timestep, condition) * self.calls

    found = toy()
    found = replace(found, model=Counts(found.model), sites=tuple(f"inner.{path}" for path in found.sites))
    with pytest.raises(GraphError, match="buffers"):
        run(compiled(found, make_plan(found, ["full", "cached"])), found.generation(1))


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_sizes_that_depend_on_values_are_an_error() -> None:
    def drops(self: Any, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        return self.toy(x, timestep, condition) + x[x.sum(-1) > 0].sum()

    found = around(drops)
    with pytest.raises(GraphError, match="depends on values"):
        run(compiled(found, make_plan(found, ["full", "cached"])), found.generation(1))


def read(found: Case) -> DenoiserInputs:
    return denoiser_inputs(captured(found)[0])


class Sound(nn.Module):
    """A video and its sound: two toys that are denoised side by side, the sound first told of by its result."""

    def __init__(self, video: nn.Module, sound: nn.Module) -> None:
        super().__init__()
        self.video, self.sound = video, sound

    def forward(self, x: Tensor, audio: Tensor, timestep: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        return self.video(x, timestep, condition), self.sound(audio, timestep, condition)


def with_sound() -> Case:
    video, sound = toy(), toy(tokens=24, seed=1)
    sites = (*(f"video.{path}" for path in video.sites), *(f"sound.{path}" for path in sound.sites))

    def draw(by: Any) -> Any:
        (x, timestep, labels), _ = video.draw(by)
        return (x, by.latents(24, 4), timestep, labels), {}

    return replace(video, model=Sound(video.model, sound.model), sites=sites, draw=draw)


def test_a_second_noisy_sample_has_sites_of_its_own() -> None:
    found = with_sound()
    assert tuple(site.path for site in found_in(found).sites) == found.sites
    inputs = read(found)
    assert len(inputs.samples) == 2
    plan = make_plan(found, ["full", "window+cfg", "cached", "full+cfg"], window=5)
    calls = found.generation(plan.steps)
    model = compiled(found, plan)
    oracle = Oracle(found.model, plan).run(calls)
    difa_fx.reset(model)
    for (args, kwargs), theirs in zip(calls, oracle, strict=True):
        for ours, expected in zip(model(*args, **kwargs), theirs, strict=True):
            assert relative(ours, expected) < TIGHT


def test_halves_of_a_second_sample_must_be_equal_too() -> None:
    found = with_sound()
    model = compiled(found, make_plan(found, ["full", "full+cfg"]))
    (x, sound, timestep, labels), _ = found.generation(1)[0]
    with pytest.raises(CFGError, match="different latents"):
        model(x, torch.randn_like(sound), timestep, labels)


def _a_time_a_token(self: Any, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
    return self.toy(x, timestep[:, -1] + 0 * timestep[:, 0], condition)


def test_where_tokens_have_times_the_last_one_moves_the_clock() -> None:
    """The first frame is given, and clean: its time is 0 at every step."""
    found = around(_a_time_a_token)

    drawn = found.draw

    def draw(by: Any) -> Any:
        (x, timestep, labels), _ = drawn(by)
        return (x, timestep[:, None] * (torch.arange(48) >= 16), labels), {}

    found = replace(found, draw=draw)
    assert read(found).timestep is not None
    model = compiled(found, make_plan(found, ROWS))
    calls = found.generation(len(ROWS))
    first = run(model, calls)
    run(model, calls[:2])
    assert all(torch.equal(a, b) for a, b in zip(first, run(model, calls), strict=True))
    (session,) = runner(model).sessions
    assert session.clock.position == len(ROWS) - 1


def test_latents_may_be_tokens_of_a_codebook() -> None:
    """Text [B, L, C] has three axes, as latents mostly have; here those are integers [B, H, W]."""

    class Masked(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.words, self.scores = inner, nn.Embedding(16, 4), nn.Linear(4, 16)

        def forward(self, ids: Tensor, text: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
            x = self.words(ids).flatten(1, 2) + text.mean(1, keepdim=True)
            return self.scores(self.inner(x, timestep, condition)).unflatten(1, (6, 8)).permute(0, 3, 1, 2)

    found = toy()
    drawn = found.draw

    def draw(by: Any) -> Any:
        (_, timestep, labels), _ = drawn(by)
        ids = torch.randint(16, (by.batch // 2, 6, 8), generator=by.generator)
        text = torch.randn(by.batch, 7, 4, generator=by.generator)
        return (torch.cat([ids, ids]), text, timestep, labels), {}

    sites = tuple(f"inner.{path}" for path in found.sites)
    found = replace(found, model=Masked(found.model).eval(), draw=draw, sites=sites)
    canonical, inputs = captured(found)
    position = denoiser_inputs(canonical).latents
    assert position is not None
    assert inputs[position].dtype is torch.int64
    plan = make_plan(found, ["full", "window", "full+cfg"], window=5)
    calls = found.generation(plan.steps)
    for ours, theirs in zip(run(compiled(found, plan), calls), Oracle(found.model, plan).run(calls), strict=True):
        assert relative(ours, tensor_of(theirs)) < TIGHT


def test_a_cast_to_the_latents_dtype_does_not_carry_their_batch() -> None:
    """A table [N, D] is cast like the latents [B, N, C]: it has no batch, and does not depend on them."""

    def casts(self: Any, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        return self.toy(x + torch.linspace(0, 1, 48, dtype=torch.float64)[:, None].type_as(x), timestep, condition)

    attention = found_in(around(casts))
    assert all(not site.refused for site in attention.sites)


def test_a_transposed_convolution_carries_the_batch() -> None:
    class Up(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.up, self.down = inner, nn.ConvTranspose1d(4, 4, 2, 2), nn.Conv1d(4, 4, 2, 2)

        def forward(self, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
            longer = self.up(x.transpose(1, 2)).transpose(1, 2)
            return self.down(self.inner(longer, timestep, condition).transpose(1, 2)).transpose(1, 2)

    found = toy(tokens=96)
    drawn = found.draw

    def draw(by: Any) -> Any:
        (x, timestep, labels), _ = drawn(by)
        return (x[:, :48], timestep, labels), {}

    found = replace(found, model=Up(found.model), draw=draw, sites=tuple(f"inner.{path}" for path in found.sites))
    assert all(not site.refused for site in found_in(found).sites)


def test_a_part_without_sites_may_come_before_the_timestep() -> None:
    def late(self: Any, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        x = x * 0.5
        torch._dynamo.graph_break()
        return self.toy(x, timestep, condition)

    found = around(late)
    plan = make_plan(found, ROWS, window=5)
    calls = found.generation(plan.steps)
    model = compiled(found, plan)
    for ours, theirs in zip(run(model, calls), Oracle(found.model, plan).run(calls), strict=True):
        assert relative(ours, tensor_of(theirs)) < TIGHT
