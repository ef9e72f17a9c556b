"""Operators of libraries, with queries made in many ways: the axes are never guessed.

A window over all tokens is full attention on other inputs than the first step's; equal ones hide a wrong layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import opaque  # noqa: F401  registers the operators
import pytest
import torch
import torch.nn.functional as F
from models import relative
from torch import Tensor, nn

import difa_fx
from difa_fx.errors import SiteError
from difa_fx.plan import Plan

HEADS, DEPTH, TOKENS = 4, 8, 24
Parts = tuple[Tensor, ...]


def unbound(x: Tensor) -> Parts:
    return x.unflatten(-1, (3, HEADS, DEPTH)).unbind(2)


def permuted_there_and_back(x: Tensor) -> Parts:
    heads_first = x.view(*x.shape[:2], 3, HEADS, DEPTH).permute(2, 0, 3, 1, 4).unbind(0)
    return tuple(F.layer_norm(part, (DEPTH,)).permute(0, 2, 1, 3) for part in heads_first)


def permuted_once(x: Tensor) -> Parts:
    return x.view(*x.shape[:2], 3, HEADS, DEPTH).permute(2, 0, 1, 3, 4).unbind(0)


def moved(x: Tensor) -> Parts:
    return x.reshape(*x.shape[:2], 3, HEADS, DEPTH).movedim(2, 0).unbind(0)


def chunked(x: Tensor) -> Parts:
    return tuple(part.unflatten(-1, (HEADS, DEPTH)) for part in x.chunk(3, -1))


def turned(x: Tensor) -> Parts:
    def turn(part: Tensor) -> Tensor:
        first, second = part.chunk(2, -1)
        return torch.cat([-second, first], -1) + part

    q, k, v = (part.transpose(1, 2) for part in chunked(x))
    return turn(q).transpose(1, 2), turn(k).transpose(1, 2), v.transpose(1, 2)


MADE: list[Callable[[Tensor], Parts]] = [unbound, permuted_there_and_back, permuted_once, moved, chunked, turned]


def define(name: str, heads_first: bool) -> None:
    """An operator that does not say which axis is which."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if heads_first:
            return F.scaled_dot_product_attention(q, k, v).contiguous()
        swapped = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(*swapped).transpose(1, 2).contiguous()

    torch.library.custom_op(name, attend, mutates_args=())
    torch.library.register_fake(name, attend)


define("someone::tokens_first", heads_first=False)
define("someone::heads_first", heads_first=True)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    settings = (0.0, DEPTH**-0.5, False, -1, -1, 0.0, None, False)
    return torch.ops.flash_attn._flash_attn_forward(q, k, v, *settings)[0]


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    settings = (None, None, None, TOKENS, TOKENS, 0.0, DEPTH**-0.5, False, -1, -1, False, None)
    return torch.ops.xformers_flash.flash_fwd(q, k, v, *settings)[0]


def tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.someone.tokens_first(q, k, v)


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return torch.ops.someone.heads_first(q, k, v).transpose(1, 2)


class Net(nn.Module):
    """Self-attention by ``attend`` on ``parts`` of a fused projection, [B, N, D]."""

    def __init__(self, parts: Callable[[Tensor], Parts], attend: Callable[..., Tensor]) -> None:
        super().__init__()
        width = HEADS * DEPTH
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.parts, self.attend = parts, attend

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        y = self.attend(*self.parts(self.qkv(x + timestep[:, None, None])))
        return x + self.out(y.reshape(x.shape))


def site_of(model: nn.Module) -> Any:
    with torch.no_grad():
        (report,) = difa_fx.inspect(model, torch.randn(2, TOKENS, HEADS * DEPTH), torch.full((2,), 9.0))
    (site,) = report.sites
    return site


@pytest.mark.parametrize("attend", [flash, xformers, tokens_first, heads_first])
@pytest.mark.parametrize("parts", MADE)
def test_a_window_over_all_tokens_is_full_on_other_inputs(
    parts: Callable[[Tensor], Parts], attend: Callable[..., Tensor]
) -> None:
    model = Net(parts, attend).eval()
    site = site_of(model)
    assert (site.heads, site.tokens) == (HEADS, TOKENS)
    torch._dynamo.reset()
    for window, equal in ((TOKENS, True), (1, False)):
        plan = Plan(steps=2, sites=[site.path], methods=[["full"], ["window"]], window=window, cfg=None)
        compiled = torch.compile(model, backend="difa", options={"plan": plan, "compiler": "eager"})
        difa_fx.reset(compiled)
        compiled(torch.randn(2, TOKENS, HEADS * DEPTH), torch.full((2,), 9.0))
        other = torch.randn(2, TOKENS, HEADS * DEPTH), torch.full((2,), 8.0)
        assert (relative(compiled(*other), model(*other)) < 1e-5) is equal


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ends = torch.arange(0, 2 * TOKENS + 1, TOKENS, dtype=torch.int32)
    settings = (ends, ends, None, TOKENS, TOKENS, 0.0, DEPTH**-0.5, False, -1, -1, False, None)
    return torch.ops.xformers_flash.flash_fwd(q, k, v, *settings)[0]


def sloped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    settings = (0.0, DEPTH**-0.5, False, -1, -1, 0.0, torch.ones(HEADS), False)
    return torch.ops.flash_attn._flash_attn_forward(q, k, v, *settings)[0]


@pytest.mark.parametrize(("attend", "name"), [(packed, "cu_seqlens_q"), (sloped, "alibi_slopes")])
def test_a_tensor_that_is_not_understood_refuses_windows_and_halves(attend: Callable[..., Tensor], name: str) -> None:
    site = site_of(Net(chunked, attend).eval())
    assert site.methods == ("full", "cached")
    assert {name in reason for _, reason in site.refused} == {True}


def test_axes_that_cannot_be_followed_refuse_windows() -> None:
    def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.reshape(2, -1).view(2, TOKENS, HEADS, DEPTH) for part in (q, k, v))
        return torch.ops.someone.tokens_first(q, k, v)

    site = site_of(Net(chunked, mixed).eval())
    assert "which of its axes has the tokens" in dict(site.refused)["window"]


def test_a_window_that_was_refused_is_an_error() -> None:
    model = Net(chunked, packed).eval()
    plan = Plan(steps=2, sites=["attention"], methods=[["full"], ["window"]], window=3, cfg=None)
    compiled = torch.compile(model, backend="difa", options={"plan": plan, "compiler": "eager"})
    with pytest.raises(SiteError, match="cu_seqlens"):
        compiled(torch.randn(2, TOKENS, HEADS * DEPTH), torch.full((2,), 9.0))
