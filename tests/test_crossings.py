"""What crosses from segment to segment: halves that stay halves, those that cannot, and what nothing reads."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from compiled import compiled, make_plan, run, runner
from models import Case, Draw, dit, relative
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from difa_fx.program import Call, ProgramBuilder

ROWS = ["full", "full+cfg", "cached", "window", "window+cfg", "cached"]


class Returning(nn.Module):
    """Gives its attention's output to the caller, who cannot take a half for both."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.time, self.qkv, self.out = nn.Linear(1, width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        h = x + self.time(timestep.float()[:, None, None] / 1000)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(h).chunk(3, -1))
        y = self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y, y * 2 + h


def returning() -> Case:
    def draw(by: Draw) -> tuple[tuple[Tensor, Tensor], dict[str, object]]:
        return (by.latents(24, 16), by.times()), {}

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = Returning().eval().requires_grad_(False)
    return Case("returning", model, draw, ("attention",), (), 1, "cond_first", 24)


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_a_half_that_the_caller_reads_is_made_whole(compiler: str) -> None:
    found = returning()
    model = compiled(found, make_plan(found, ROWS, window=24), compiler)
    calls = [args for args, _ in found.generation(len(ROWS))]  # nothing but the latents: the halves are equal
    before = None
    for method, (x, timestep) in zip(ROWS, calls, strict=True):
        y, rest = model(x, timestep)
        if method == "cached":
            assert torch.equal(y, before)
        else:
            for got, want in zip((y, rest), found.model(x, timestep), strict=True):
                assert relative(got, want) < 1e-5
        before = y.clone()
    (site,) = (call for call in runner(model).programs[1] if call.keeps)
    assert site.widen == (0,)


def test_what_a_trunk_reads_stays_a_half() -> None:
    found = dit(layers=3)
    plan = make_plan(found, ROWS)
    model = compiled(found, plan)
    run(model, found.generation(plan.steps))
    programs = runner(model).programs
    assert all(axis is None for program in programs for call in program for axis in call.widen)
    assert any(call.widen for call in programs[1])


def test_what_only_a_cached_site_reads_is_not_computed() -> None:
    found = dit(layers=3)
    plan = make_plan(found, ["full", "cached"])
    model = compiled(found, plan)
    run(model, found.generation(plan.steps))
    whole, lean = ([len(call.outputs) for call in program] for program in runner(model).programs)
    trunks = range(0, len(whole) - 1, 2)
    assert [lean[i] for i in trunks] == [whole[i] - 1 for i in trunks]


def test_a_piece_has_what_is_read_last_for_itself() -> None:
    slots: list[Any] = [torch.ones(2), torch.ones(2), None]
    last, read_again = (weakref.ref(value) for value in slots[:2])
    alive: list[tuple[bool, bool]] = []

    def piece(values: list[Any]) -> list[Tensor]:
        values.clear()
        alive.append((last() is not None, read_again() is not None))
        return [torch.zeros(1)]

    found = dit(layers=2)
    model = compiled(found, make_plan(found, ["full"]))
    run(model, found.generation(1))
    builder: ProgramBuilder = runner(model)._builder
    builder.run([Call(piece, inputs=(0, 1), outputs=(2,), dead=(0,))], slots, {})
    assert alive == [(False, True)]
