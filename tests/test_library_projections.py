"""Projections that are a library's operator, as those of quantized weights are: sites keep their names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import relative
from torch import Tensor, nn

import difa_fx
from difa_fx.plan import Plan

HEADS, WIDTH, TOKENS = 4, 32, 24
NAMESPACES = ("difa_tests_packed", "bitsandbytes")
"""One that is not known, and one whose operators are known to be linears."""


def packed_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """A linear whose weights are 8-bit numbers of a scale each row."""
    return F.linear(x, packed.to(x.dtype) * scale[:, None], bias)


for namespace in NAMESPACES:
    torch.library.custom_op(f"{namespace}::difa_test_linear", packed_linear, mutates_args=())
    torch.library.register_fake(f"{namespace}::difa_test_linear", packed_linear)


class PackedLinear(nn.Module):
    """A linear by such an operator."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.namespace = namespace
        weight = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
        scale = weight.abs().amax(1) / 127
        self.weight = nn.Parameter((weight / scale[:, None]).round().to(torch.int8), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        linear = getattr(torch.ops, self.namespace).difa_test_linear
        result: Tensor = linear(x, self.weight, self.scale, self.bias)
        return result


class Attention(nn.Module):
    """Attention with such projections."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (PackedLinear(namespace) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (to(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Denoiser(nn.Module):
    """Two of them, behind an ordinary projection."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.proj_in = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": Attention(namespace)}) for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = self.proj_in(x) + timestep[:, None, None] / 1000
        for block in self.blocks:
            x = x + block["attn"](F.layer_norm(x, (WIDTH,)))
        return x


SITES = ("blocks.0.attn", "blocks.1.attn")


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_sites_have_the_names_of_their_modules(namespace: str) -> None:
    (report,) = difa_fx.inspect(Denoiser(namespace).eval(), torch.randn(2, TOKENS, WIDTH), torch.full((2,), 900.0))
    assert tuple(site.path for site in report.sites) == SITES
    halves = [any("+cfg" in method for method in site.methods) for site in report.sites]
    assert halves == [namespace == "bitsandbytes"] * 2
    assert all({"full", "window", "cached"} <= set(site.methods) for site in report.sites)


@torch.no_grad()
def test_a_window_over_all_tokens_is_full_attention_on_other_inputs() -> None:
    model = Denoiser(NAMESPACES[1]).eval()
    rows = [["full"] * 2, ["window"] * 2, ["window+cfg"] * 2]
    plan = Plan(steps=3, sites=SITES, methods=rows, window=TOKENS, cfg="cond_first")
    compiled = torch.compile(model, backend="difa", options={"plan": plan, "compiler": "aot_eager"})
    difa_fx.reset(compiled)
    for t in (900.0, 500.0, 100.0):
        x, timestep = torch.randn(1, TOKENS, WIDTH).repeat(2, 1, 1), torch.full((2,), t)
        assert relative(compiled(x, timestep), model(x, timestep)) < 1e-5
