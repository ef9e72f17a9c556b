"""Each kind of operation traced once: the graph is the one that a trace of the whole gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from models import CASES, case, dit
from torch import Tensor, fx, nn

from difa_fx._torch import apart_from_dynamo, fake_inputs, input_sources, new_fake_mode
from difa_fx._torch.tracing import writes
from difa_fx.passes import canonicalize as canonical_form
from difa_fx.passes import kinds
from difa_fx.passes.canonicalize import CanonicalGraph, canonicalize
from difa_fx.passes.graph_tools import is_write, module_path
from difa_fx.passes.retrace import retrace

Graph = tuple[fx.GraphModule, Sequence[Any]]


def dynamo_graph(function: Callable[..., Any], args: Any, kwargs: Any = None) -> Graph:
    """What Dynamo hands to a backend."""
    taken: list[Graph] = []

    def capture(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        taken.append((gm, list(inputs)))
        return gm.forward

    torch.compile(function, backend=capture, dynamic=False)(*args, **(kwargs or {}))
    (graph,) = taken
    return graph


def retraced(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule | None:
    with apart_from_dynamo():
        return retrace(gm, fake_inputs(inputs, new_fake_mode()))


def written_out(canonical: CanonicalGraph) -> list[Any]:
    """A graph without names: operations, constants, edges, values and module paths."""
    nodes = list(canonical.gm.graph.nodes)
    place = {node: f"%{i}" for i, node in enumerate(nodes)}
    written: list[Any] = [canonical.sources, canonical.static]
    for node in nodes:
        arguments = fx.node.map_arg((node.args, node.kwargs), place.__getitem__)
        target = str(node.target) if node.op == "call_function" else ""
        written.append((node.op, target, repr(arguments), _described(node.meta.get("val")), module_path(node)))
    return written


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    return [_described(item) for item in value] if isinstance(value, (list, tuple)) else value


def both_ways_agree(gm: fx.GraphModule, inputs: Sequence[Any], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Assert that both traces of a graph are one; gives whether there were two.

    Where it writes in place, the trace of the whole spells some views in another way; then their results are the same.
    """
    if retraced(gm, inputs) is None:
        return False
    with apart_from_dynamo(), monkeypatch.context() as patched:
        ours = canonicalize(gm, inputs, sources=input_sources(gm))
        patched.setattr(canonical_form, "retrace", lambda gm, fakes: None)
        theirs = canonicalize(gm, inputs, sources=input_sources(gm))
    if not any(is_write(node) for node in gm.graph.nodes):
        assert written_out(ours) == written_out(theirs)
        return True
    assert ours.sources == theirs.sources and ours.static == theirs.static and not theirs.written
    for one, other in zip(ours.gm(*inputs), theirs.gm(*inputs), strict=True):
        assert torch.equal(one, other)
    return True


@pytest.mark.parametrize("name", CASES)
def test_both_ways_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = case(name)
    gm, inputs = dynamo_graph(found.model, *found.generation(1)[0])
    both_ways_agree(gm, inputs, monkeypatch)


def test_a_deep_denoiser_has_no_more_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[int] = []
    trace = kinds.trace_functional

    def counted(gm: fx.GraphModule, fakes: Sequence[Any]) -> fx.GraphModule | None:
        traced.append(len(gm.graph.find_nodes(op="output")[0].all_input_nodes))
        return trace(gm, fakes)

    monkeypatch.setattr(kinds, "trace_functional", counted)
    for layers in (2, 5):
        found = dit(layers=layers)
        gm, inputs = dynamo_graph(found.model, *found.generation(1)[0])
        assert both_ways_agree(gm, inputs, monkeypatch)
    shallow, deep = traced[0], traced[-1]
    assert shallow == deep < 80


def _alike(x: Tensor, y: Tensor) -> Tensor:
    """Operations that differ in a constant, its type, or in which inputs are one."""
    return x * x + x * y + (x + 1) * (x + 1.0) * (y + True) + x.sum(0) + x.sum(0, keepdim=True) + y[0:1] + y[1:2]


def _parted(x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
    """Tuples between operations, a list of tensors, a dict of outputs, an input that is returned."""
    first, second = x.chunk(2, dim=1)
    values, places = torch.cat([second, first, y], dim=1).max(dim=1)
    return torch.stack((values, values.neg())), {"places": places, "input": x}


def _no_op(x: Tensor, y: Tensor) -> Tensor:
    """An operation that yields its input."""
    return x.contiguous().float() + torch.nn.functional.dropout(y, 0.5, training=False) + torch.ones(6)


@pytest.mark.parametrize("function", [_alike, _parted, _no_op])
def test_results_are_the_functions(function: Callable[..., Any]) -> None:
    args = torch.randn(4, 6), torch.randn(4, 6)
    gm, inputs = dynamo_graph(function, args)
    made = retraced(gm, inputs)
    assert made is not None
    for ours, theirs in zip(made(*inputs), gm(*inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_a_module_that_returns_nothing_beside_its_output() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        gm, inputs = dynamo_graph(lambda x: attention(x, x, x, need_weights=False)[0], (x,))
        made = retraced(gm, inputs)
        assert made is not None
        assert torch.allclose(made(*inputs)[0], attention(x, x, x)[0], atol=1e-6)


def _writes_by_method(x: Tensor, y: Tensor) -> Tensor:
    return (x * 2).add_(y)


def _writes_by_operator(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z += y
    return z


def _writes_items(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z[0] = y[0]
    before = z[..., :2] + 1
    z[..., 0::2], z[1:, 1::2] = x[..., 3:], 7.0
    return z.sum(0) + before.sum()


def _rotates_a_part(x: Tensor, y: Tensor) -> Tensor:
    z = torch.nn.functional.layer_norm(x, (6,)).to(x.dtype)
    z[:, 2:] = z[:, 2:] * y[:, 2:]
    z[:, 2:] = z[:, 2:].flip(1)
    return z.flatten()


def _writes_a_view_alone(x: Tensor, y: Tensor) -> Tensor:
    z = (x * 2).transpose(0, 1)
    z.mul_(y.transpose(0, 1))
    return z


@pytest.mark.parametrize(
    "function", [_writes_by_method, _writes_by_operator, _writes_items, _rotates_a_part, _writes_a_view_alone]
)
def test_a_write_to_what_has_no_other_name_is_a_new_value(function: Callable[..., Any]) -> None:
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    gm, inputs = dynamo_graph(function, (x, y))
    made = retraced(gm, inputs)
    assert made is not None and not any(writes(node) for node in made.graph.nodes)
    assert torch.equal(made(*inputs)[0], function(x, y))


def _reads_an_older_view(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    view = z[1:]
    z[2] = y[0]
    return view


def _reads_what_a_view_is_of(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z.transpose(0, 1)[1] = y[:, 0]
    return z


def _reads_its_neighbour(x: Tensor, y: Tensor) -> Tensor:
    z, other = (x * 2).chunk(2)
    z += y[:2]
    return other * z


def _writes_what_it_overwrites(x: Tensor, y: Tensor) -> Tensor:
    z = x * y
    z[:2] = z[2:]
    return z


def _writes_to_an_input(x: Tensor, y: Tensor) -> Tensor:
    x.mul_(y)
    return x + 1


def _writes_to_a_view_of_an_input(x: Tensor, y: Tensor) -> Tensor:
    x.transpose(0, 1)[0] = y[:, 0]
    return y + 1


def _writes_by_function(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.relu(x * y, inplace=True)


def _autocast(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ y.T


@pytest.mark.parametrize(
    "function",
    [
        _reads_an_older_view,
        _reads_what_a_view_is_of,
        _reads_its_neighbour,
        _writes_what_it_overwrites,
        _writes_to_an_input,
        _writes_to_a_view_of_an_input,
        _writes_by_function,
        _autocast,
    ],
)
def test_where_more_than_edges_matters_the_whole_is_traced(function: Callable[..., Any]) -> None:
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    overwritten = x.clone()
    gm, inputs = dynamo_graph(function, (overwritten, y))
    assert retraced(gm, inputs) is None
    with apart_from_dynamo():
        canonical = canonicalize(gm, inputs, sources=input_sources(gm))
    found = canonical.gm(*[x if given is overwritten else given for given in inputs])
    assert torch.equal(found[len(canonical.written)], function(x.clone(), y))


TENSORS = st.integers(0, 99)
PROGRAMS = st.lists(st.tuples(st.sampled_from(("new", "view", "write", "write part")), TENSORS, TENSORS), max_size=12)
VIEWS = (torch.t, lambda t: t[::2], lambda t: t.reshape(4, 4), lambda t: t.chunk(2)[1], lambda t: t[:, 1:])
PARTS = ((slice(None), slice(0, None, 2)), (0,), (Ellipsis, 1), (slice(1, 3), slice(None)))


def _follow(program: list[tuple[str, int, int]], x: Tensor, y: Tensor) -> list[Tensor]:
    """A straight line of operations, views and writes; gives the last tensors that it made."""
    made = [x + y, x * y]
    for what, one, two in program:
        first, second = made[one % len(made)], made[two % len(made)]
        if what == "new":
            made.append(first.sum() + second)
        elif what == "view" and first.shape == (4, 4):
            made.append(VIEWS[two % len(VIEWS)](first))
        elif what == "write":
            first.mul_(second.sum().sin())
        elif what == "write part" and first.shape == (4, 4):
            first[PARTS[two % len(PARTS)]] = second.sum().cos()
    return made[-3:]


@hypothesis.given(PROGRAMS)
@hypothesis.settings(max_examples=60, deadline=None)
def test_no_write_is_lost(program: list[tuple[str, int, int]]) -> None:
    x, y = torch.randn(2, 4, 4)
    torch._dynamo.reset()
    gm, inputs = dynamo_graph(lambda x, y: _follow(program, x, y), (x, y))
    with apart_from_dynamo():
        canonical = canonicalize(gm, inputs, sources=input_sources(gm))
    for ours, theirs in zip(canonical.gm(*inputs), _follow(program, x, y), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_symbolic_sizes_are_left_to_a_trace_of_the_whole() -> None:
    taken: list[Graph] = []

    def capture(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        taken.append((gm, list(inputs)))
        return gm.forward

    torch.compile(lambda x: x.reshape(-1) * 2, backend=capture, dynamic=True)(torch.randn(3, 5))
    ((gm, inputs),) = taken
    assert retraced(gm, inputs) is None


def test_what_dynamo_found_out_is_not_taken_on_trust() -> None:
    x = torch.randn(4, 6)
    gm, inputs = dynamo_graph(lambda x: x.transpose(0, 1) * 2, (x,))
    (product,) = [node for node in gm.graph.nodes if node.op == "call_function"]
    value = product.meta["example_value"]
    product.meta["example_value"] = value.new_empty(tuple(reversed(value.shape)))
    assert retraced(gm, inputs) is None
