"""Attention that Dynamo leaves outside its graphs is listed, with the break that put it there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import difa_fx
from difa_fx import cli


class Attention(nn.Module):
    """Plain self-attention [B, N, D], fused or spelled out."""

    def __init__(self, *, fused: bool = True) -> None:
        super().__init__()
        self.fused = fused
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Apart(Attention):
    """Attention that its author keeps from Dynamo."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Denoiser(nn.Module):
    """One attention in a graph, and one that is not."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), second])

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + timestep[:, None, None]
        x = x + self.blocks[0](x)
        return x + self.blocks[1](x)


INPUTS = torch.randn(2, 24, 16), torch.full((2,), 0.5)


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_kept_from_dynamo_is_listed(fused: bool) -> None:
    *graphs, outside = difa_fx.inspect(Denoiser(Apart(fused=fused)).eval(), *INPUTS)
    assert [site.path for graph in graphs for site in graph.sites] == ["blocks.0"]
    ((path, why),) = outside.rejected
    assert path == "blocks.1"
    assert "runs outside any graph" in why
    assert "disable" in why
    assert "test_outside_graphs.py, line" in why


def test_nothing_is_listed_where_graphs_hold_all() -> None:
    class Broken(Denoiser):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            x = x + self.blocks[0](x + timestep[:, None, None])
            torch._dynamo.graph_break()
            return x + self.blocks[1](x)

    reports = difa_fx.inspect(Broken(Attention()).eval(), *INPUTS)
    assert [site.path for report in reports for site in report.sites] == ["blocks.0", "blocks.1"]
    assert not [pair for report in reports for pair in report.rejected]


def broken() -> Any:
    """For ``module:function``."""
    return Denoiser(Apart()).eval(), INPUTS, {}


def test_the_command_tells_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(__file__).rpartition("/")[0])
    assert cli.main(["inspect", "test_outside_graphs:broken"]) == 0
    assert "blocks.1: it runs outside any graph" in capsys.readouterr().out
