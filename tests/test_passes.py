"""The passes one by one: what is found and what is not, equal layers equal, and rewritten graphs to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from compiled import compiled, make_plan, run, runner
from models import CASES, Case, case, dit, pixart, relative
from torch import fx

import difa_fx
from difa_fx._torch import FakeTensorMode, fake_inputs
from difa_fx.passes.batch_axis import batch_axes
from difa_fx.passes.batch_step import LostBatchError
from difa_fx.passes.canonicalize import CanonicalGraph, canonicalize
from difa_fx.passes.find_attention import Attention, find_attention
from difa_fx.passes.graph_tools import clean_path, placeholders
from difa_fx.passes.partition import extract, partition
from difa_fx.passes.rewrite import RewriteSettings, Variant, rewrite, rewrite_step
from difa_fx.schedule import make_schedule


def captured(found: Case) -> tuple[CanonicalGraph, list[Any]]:
    """The canonical graph of a case and the inputs it was traced with."""
    taken: list[tuple[CanonicalGraph, list[Any]]] = []

    def capture(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from difa_fx._torch import apart_from_dynamo, input_sources

        with apart_from_dynamo():
            taken.append((canonicalize(gm, inputs, sources=input_sources(gm)), list(inputs)))
        return gm.forward

    args, kwargs = found.generation(1)[0]
    torch.compile(found.model, backend=capture, dynamic=False)(*args, **kwargs)
    return taken[0]


def found_in(found: Case) -> Attention:
    return find_attention(captured(found)[0])


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("L['self'].blocks.0.attn", "blocks.0.attn"),
        ("L['self'].__dict__['_modules']['transformer_blocks'].0.attn1", "transformer_blocks.0.attn1"),
        (
            "L['self'].__dict__['_modules']['down_blocks'].0.attentions.1.__dict__['_modules']['blocks'].2.attn1",
            "down_blocks.0.attentions.1.blocks.2.attn1",
        ),
        ("G['G_MODEL']._modules['blocks']._modules['3'].attn", "blocks.3.attn"),
        ("L['s'].net._orig_mod.blocks.0.attn", "net.blocks.0.attn"),
        ("L['self'].forward.__self__.blocks.1.attn1", "blocks.1.attn1"),
        (
            "L['self'].forward.__self__.blocks.0.forward.func.__closure__[0].cell_contents.forward.__self__.attn1",
            "blocks.0.attn1",
        ),
        ("L['self'].blocks.0.forward_block.attn1", "blocks.0.forward_block.attn1"),
    ],
)
def test_module_paths_are_written_as_users_write_them(raw: str, clean: str) -> None:
    assert clean_path(raw) == clean


@pytest.mark.parametrize("name", CASES)
def test_every_expected_site_is_found_and_no_other(name: str) -> None:
    found = case(name)
    attention_found = found_in(found)
    assert tuple(site.path for site in attention_found.sites) == found.sites
    assert tuple(site.path for site in attention_found.rejected) == found.rejected
    assert all(site.reason for site in attention_found.rejected)


@pytest.mark.parametrize("name", CASES)
def test_canonicalize_keeps_the_function(name: str) -> None:
    found = case(name)
    canonical, inputs = captured(found)
    args, kwargs = found.generation(1)[0]
    torch._dynamo.reset()
    expected = found.model(*args, **kwargs)
    expected = expected[0] if isinstance(expected, tuple) else getattr(expected, "sample", expected)
    assert torch.equal(canonical.gm(*inputs)[0], expected)


def test_a_site_that_cannot_be_halved_says_why() -> None:
    found = case("toy_odd_batch")
    (first, *_) = found_in(found).sites
    assert {m.value for m in first.refused} == {"full+cfg", "window+cfg"}
    assert "batch of 3" in next(iter(first.refused.values()))


def test_segments_put_together_are_the_graph() -> None:
    found = pixart()
    canonical, inputs = captured(found)
    attention = find_attention(canonical)
    expected = canonical.gm(*inputs)[0]
    values = dict(zip(placeholders(canonical.gm.graph), inputs, strict=True))
    for segment in partition(canonical, attention).segments:
        piece, _ = extract(segment)
        values |= zip(segment.outputs, piece(*(values[node] for node in segment.inputs)), strict=True)
    (result,) = canonical.gm.graph.output_node().args[0]
    assert torch.equal(values[result], expected)


def test_what_nothing_reads_leaves_a_trunk() -> None:
    canonical, _ = captured(dit(layers=3))
    attention = find_attention(canonical)
    (trunk, *_) = (s for s in partition(canonical, attention).segments[2:] if s.site is None)
    (read,) = (i for i, node in enumerate(trunk.outputs) if node in attention.sites[1].sources)
    settings = RewriteSettings(window=8, second=False, kernel="auto")
    whole, lean = (rewrite(trunk, variant, settings) for variant in (Variant(), Variant(unread=(read,))))
    norms = [
        sum("layer_norm" in str(node.target) for node in graph.gm.graph.nodes if node.op == "call_function")
        for graph in (whole, lean)
    ]
    assert norms == [2, 1]
    inputs = [_like(value) for value in whole.inputs]
    expected = [value for i, value in enumerate(whole.gm(*inputs)) if i != read]
    for got, want in zip(lean.gm(*inputs), expected, strict=True):
        assert torch.equal(got, want)


def _like(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.randn(value.shape) if value.is_floating_point() else torch.zeros(value.shape, dtype=value.dtype)


def test_equal_layers_are_equal() -> None:
    parts = partition(captured_graph := captured(dit(layers=6))[0], find_attention(captured_graph))
    assert len(parts.segments) == 13
    assert len(parts.unique_blocks) == 2
    assert len(parts.unique) == 4


SPELLINGS = [("cpp", "refreshed_attention", 2), ("sdpa", "window_residual", 3)]
"""A kernel, the node that makes the residual, and how many of three sites keep the model's own attention beside it."""


@pytest.mark.parametrize(("kernel", "refresh", "full"), SPELLINGS)
def test_the_rewritten_step_shows_its_nodes_and_computes_what_the_pieces_do(
    kernel: str, refresh: str, full: int
) -> None:
    found = dit(layers=3)
    plan = make_plan(found, ["full", ["window", "cached", "full+cfg"]])
    calls = found.generation(2)
    model = compiled(found, plan, "eager")
    (expected_first, expected) = run(model, calls)
    schedule = make_schedule(plan, found.sites)
    settings = RewriteSettings(window=plan.window, second=False, kernel=kernel)
    torch._dynamo.reset()
    canonical, inputs = captured(found)
    sites = find_attention(canonical).sites
    first = rewrite_step(canonical.gm, sites, schedule.row(0), settings)
    second = rewrite_step(canonical.gm, sites, schedule.row(1), settings)
    names = {node.name for node in second.graph.nodes}
    assert {"window_attention", "cached_output", "cfg_half", "cfg_shared"} <= names
    names = [node.name for node in first.graph.nodes]
    assert refresh in names
    assert sum(name.startswith("scaled_dot_product") for name in names) == full
    output, residual = first(*inputs)
    assert relative(output, expected_first) < 1e-5
    cached = _output_of(canonical, inputs, sites[1].outputs[0])
    args, kwargs = calls[1]
    inputs[_position(canonical, "hidden_states")] = args[0]
    inputs[_position(canonical, "timestep")] = kwargs["timestep"]
    inputs[_position(canonical, "class_labels")] = kwargs["class_labels"]
    state = [
        residual if node.name.startswith("residual_in") else cached
        for node in placeholders(second.graph)[len(inputs) :]
    ]
    assert relative(second(*inputs, *state)[0], expected) < 1e-5


def _position(canonical: CanonicalGraph, name: str) -> int:
    return next(i for i, source in enumerate(canonical.sources) if source == f"L['{name}']")


def _output_of(canonical: CanonicalGraph, inputs: list[Any], node: fx.Node) -> torch.Tensor:
    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n is node:
                self.kept = value
            return value

    interpreter = Keep(canonical.gm)
    interpreter.run(*inputs)
    return interpreter.kept


def test_a_view_that_mixes_the_batch_is_given_up_with_a_reason() -> None:
    aten = torch.ops.aten
    graph = fx.Graph()
    x = graph.placeholder("x")
    mixed = graph.call_function(aten.permute.default, (x, [1, 0, 2]))
    merged = graph.call_function(aten.reshape.default, (mixed, [12, 5]))
    graph.output((merged,))
    with FakeTensorMode() as mode:
        (fake,) = fake_inputs([torch.empty(4, 3, 5)], mode)
        x.meta["val"] = fake
        mixed.meta["val"] = fake.permute(1, 0, 2)
        merged.meta["val"] = mixed.meta["val"].reshape(12, 5)
    axes, lost = batch_axes(graph, {x: 0})
    assert axes == {x: 0, mixed: 1}
    assert isinstance(lost[merged], LostBatchError)
    assert "merged" in lost[merged].reason


def test_inspect_tells_what_is_found_and_what_is_left() -> None:
    found = pixart()
    args, kwargs = found.generation(1)[0]
    (report,) = difa_fx.inspect(found.model, *args, **kwargs)
    assert [site.path for site in report.sites] == list(found.sites)
    assert [path for path, _ in report.rejected] == list(found.rejected)
    assert all("cross-attention" in reason for _, reason in report.rejected)
    assert 0 < sum(site.flops_share for site in report.sites) < 1
    assert report.timestep == "timestep"


def test_a_runner_frees_what_is_dead() -> None:
    found = dit(layers=3)
    model = compiled(found, make_plan(found, ["full"]), "eager")
    run(model, found.generation(1))
    program = runner(model).programs[0]
    filled = {slot for call in program for slot in (*call.inputs, *call.outputs)}
    assert filled - {slot for call in program for slot in call.dead} == set(program[-1].outputs)
