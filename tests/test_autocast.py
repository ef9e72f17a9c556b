"""Autocast: the caller's and the denoiser's own, obeyed operation by operation, and off once it is written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from compiled import compiled, make_plan, run, runner
from models import Case, dit, relative, tensor_of
from test_passes import captured
from test_retrace import dynamo_graph
from torch import Tensor, nn
from zoo import zoo_case

from difa_fx._torch import apart_from_dynamo, input_sources
from difa_fx.errors import GraphError
from difa_fx.passes.autocast import is_autocast, without_autocast
from difa_fx.passes.canonicalize import canonicalize
from difa_fx.passes.find_attention import find_attention
from difa_fx.passes.partition import partition

BF16 = torch.bfloat16
ROUNDING = 0.02
"""Of bfloat16, where a piece is compiled and computes in another order."""


def _nested(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", BF16):
        z = x @ y.T
        with torch.autocast("cpu", enabled=False):
            z = z.float() @ y
        z = nn.functional.layer_norm(z, (6,)).softmax(-1)
        return z @ y.T


def _with_a_write(x: Tensor, y: Tensor) -> Tensor:
    z = _nested(x, y)
    z[0] = 1
    return z.float() * 2


def _without_any(x: Tensor, y: Tensor) -> Tensor:
    products = x @ y.T, nn.functional.linear(x, y), torch.einsum("ij,kj->ik", x, y)
    return torch.cat([*products, x.softmax(-1), y.to(BF16)], dim=1)


def _off_inside(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        exact = x @ y.T
    return exact + x @ y.T


def _on_after_an_error_free_region(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", BF16, enabled=False):
        x = x @ y.T
    with torch.autocast("cpu", torch.float16):
        return x @ y


FUNCTIONS = (_nested, _with_a_write, _without_any, _off_inside, _on_after_an_error_free_region)


@pytest.mark.parametrize("ambient", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_canonical_graph_computes_what_autocast_does(function: Callable[..., Any], ambient: bool) -> None:
    args = torch.randn(4, 6), torch.randn(4, 6)
    with torch.autocast("cpu", BF16, enabled=ambient):
        expected = function(*args)
        gm, inputs = dynamo_graph(function, args)
        with apart_from_dynamo():
            canonical = canonicalize(gm, inputs, sources=input_sources(gm))
    assert not any(is_autocast(node) for node in canonical.gm.graph.nodes)
    (got,) = canonical.gm(*inputs)
    assert got.dtype is expected.dtype
    assert torch.equal(got, expected)
    assert not torch.is_autocast_enabled("cpu")


def test_what_happens_inside_an_operation_is_an_error_that_names_it() -> None:
    args = torch.randn(4, 6), torch.randn(6, 4)
    gm, inputs = dynamo_graph(lambda x, y: torch.tensordot(x, y, 1), args)
    with pytest.raises(GraphError, match=r"aten\.tensordot"), torch.autocast("cpu", BF16), apart_from_dynamo():
        canonicalize(gm, inputs, sources=input_sources(gm))
    assert not torch.is_autocast_enabled("cpu")


def test_without_autocast_ends() -> None:
    with torch.autocast("cpu", BF16):
        with without_autocast():
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") is BF16


class _OwnAutocast(nn.Module):
    """A denoiser whose forward turns autocast on, as many a research repository's does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", BF16):
            return self.inner(*args, **kwargs)


def _own(found: Case) -> Case:
    return replace(found, model=_OwnAutocast(found.model), sites=tuple(f"inner.{path}" for path in found.sites))


@pytest.mark.parametrize("whose", ["the caller's", "the denoiser's"])
@pytest.mark.parametrize("name", ["dit", "sd35", "qwen_image"])
def test_every_site_is_found_and_full_is_the_denoiser(name: str, whose: str) -> None:
    """sd35 normalises queries and keys in float32, and its attention is cast; qwen_image has a mask, which is cast."""
    found = dit() if name == "dit" else zoo_case(name)
    found = _own(found) if whose == "the denoiser's" else found
    calls = found.generation(3)
    model = compiled(found, make_plan(found, ["full", "window", "full"], window=found.tokens))
    with torch.no_grad(), torch.autocast("cpu", BF16, enabled=whose == "the caller's"):
        expected = [tensor_of(found.model(*args, **kwargs)) for args, kwargs in calls]
        got = run(model, calls)
    assert runner(model).stats.sites == found.sites
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype is theirs.dtype
        assert relative(ours.float(), theirs.float()) < ROUNDING


def test_compiled_pieces_do_what_inductor_does() -> None:
    found = dit(layers=2)
    calls = found.generation(3)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        expected = [tensor_of(found.model(*args, **kwargs)) for args, kwargs in calls]
        planned = compiled(found, make_plan(found, ["full", "full+cfg", "cached"]), "inductor")
        got = run(planned, calls)
    assert [output.dtype for output in got] == [output.dtype for output in expected]
    assert relative(got[0].float(), expected[0].float()) < ROUNDING


def test_state_is_in_the_dtype_that_autocast_gives() -> None:
    sizes = {}
    for enabled in (False, True):
        found = dit(layers=2)
        model = compiled(found, make_plan(found, ["full", "cached", "full"]))
        with torch.no_grad(), torch.autocast("cpu", BF16, enabled=enabled):
            run(model, found.generation(1))
        sizes[enabled] = runner(model).stats.state_bytes
    assert sizes[False] == 2 * sizes[True] > 0


def test_casts_of_parameters_do_not_make_equal_layers_differ() -> None:
    shallow, deep = dit(layers=2), dit(layers=4)
    counts = []
    for found in (shallow, deep):
        torch._dynamo.reset()
        with torch.no_grad(), torch.autocast("cpu", BF16):
            canonical, _ = captured(found)
        counts.append(len(partition(canonical, find_attention(canonical)).unique))
    assert counts[0] == counts[1]
