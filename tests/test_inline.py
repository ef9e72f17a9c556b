"""Checkpointed blocks are the blocks, and a movedim is a permutation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import relative
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import ToyAttention

import difa_fx
from difa_fx.errors import GraphError
from difa_fx.plan import Plan


class Net(nn.Module):
    """Two blocks, each run by ``torch.utils.checkpoint``."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.blocks, self.how = nn.ModuleList(ToyAttention(16, 2, 12) for _ in range(2)), how

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + timestep[:, None, None] / 1000
        for block in self.blocks:
            x = x + checkpoint(block, x, None, **self.how)
        return x


HOW = [{"use_reentrant": False}, {"use_reentrant": True}, {"use_reentrant": False, "preserve_rng_state": False}]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("how", HOW)
def test_a_checkpointed_block_is_the_block(how: dict[str, bool]) -> None:
    model = Net(**how).eval()
    calls = [(torch.randn(2, 12, 16), torch.full((2,), t)) for t in (900.0, 500.0)]
    (report,) = difa_fx.inspect(model, *calls[0])
    assert [site.path for site in report.sites] == ["blocks.0", "blocks.1"]
    torch._dynamo.reset()
    plan = Plan(steps=2, sites=["blocks.0", "blocks.1"], methods=[["full"] * 2, ["window"] * 2], window=12, cfg=None)
    compiled = torch.compile(model, backend="difa", options={"plan": plan, "compiler": "eager"})
    for call in calls:
        assert relative(compiled(*call), model(*call)) < 1e-5


def test_without_a_plan_aot_eager_is_torchs_own() -> None:
    model = Net(use_reentrant=False).eval()
    call = torch.randn(2, 12, 16), torch.full((2,), 9.0)
    compiled = torch.compile(model, backend="difa", options={"compiler": "aot_eager"})
    assert torch.equal(compiled(*call), model(*call))


def test_what_nobody_foresaw_is_an_error_of_ours_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AttributeError("no such thing")

    call = torch.randn(2, 12, 16), torch.full((2,), 9.0)
    model = Net(use_reentrant=False).eval()
    options = {"plan": Plan.full(["blocks.0"], steps=2), "compiler": "eager"}
    for place, run in (
        ("inspection", lambda: difa_fx.inspect(model, *call)),
        ("backend", lambda: torch.compile(model, backend="difa", options=options)(*call)),
    ):
        torch._dynamo.reset()
        monkeypatch.setattr(f"difa_fx.{place}.find_attention", fail)
        with pytest.raises(GraphError, match="AttributeError: no such thing") as told:
            run()
        assert isinstance(told.value.__cause__, AttributeError)


class Changing(nn.Module):
    """Is given a Python float that differs between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ToyAttention(16, 2, 12), ToyAttention(16, 2, 12)

    def forward(self, x: Tensor, timestep: Tensor, scale: float) -> Tensor:
        x = x + timestep[:, None, None] / 1000
        x = x + scale * self.first(x, None)
        return x + scale * self.second(x, None)


def test_a_float_that_changes_is_right_or_an_error() -> None:
    model = Changing().eval()
    plan = Plan(steps=2, sites=["first", "second"], methods=[["full"] * 2, ["cached"] * 2], window=2, cfg=None)
    compiled = torch.compile(model, backend="difa", options={"plan": plan, "compiler": "aot_eager"})
    x, refused = torch.randn(2, 12, 16), 0
    for scale in (1.0, 0.5, 0.25):
        difa_fx.reset(compiled)
        try:
            assert (
                relative(compiled(x, torch.full((2,), 900.0), scale), model(x, torch.full((2,), 900.0), scale)) < 1e-5
            )
        except GraphError:
            refused += 1
    assert refused < 3
