"""Small tensors are made where they are read."""

from __future__ import annotations

import pytest
import torch
from compiled import compiled, make_plan, run, runner
from models import Case, dit, pixart, relative, tensor_of
from oracle import Oracle
from torch import Tensor, fx

from difa_fx.passes import partition as partitions
from difa_fx.passes import sinking
from difa_fx.passes.graph_tools import descendants
from difa_fx.passes.partition import Partition

ROWS = ["full", "window+cfg", "cached", "full+cfg", "window", "cached"]


def partition_of(found: Case) -> Partition:
    model = compiled(found, make_plan(found, ROWS, window=8))
    args, kwargs = found.generation(1)[0]
    model(*args, **kwargs)
    return runner(model).partition


def sizes(nodes: tuple[fx.Node, ...]) -> list[int]:
    return [node.meta["val"].numel() for node in nodes if isinstance(node.meta["val"], Tensor)]


@pytest.mark.parametrize("build", [lambda: dit(layers=4), pixart])
def test_parts_of_a_small_tensor_do_not_cross(build, monkeypatch) -> None:
    crossing = [len(segment.outputs) for segment in partition_of(build()).segments if segment.site is None]
    torch._dynamo.reset()
    monkeypatch.setattr(partitions, "sink", lambda graph, place, sites, latents: sites)
    before = [len(segment.outputs) for segment in partition_of(build()).segments if segment.site is None]
    assert sum(crossing) < sum(before) - len(crossing)


def test_equal_layers_stay_equal_and_hand_on_tokens_and_one_product() -> None:
    partition = partition_of(dit(layers=6))
    assert len(partition.unique_blocks) == 2
    for segment in partition.segments[2:-1:2]:
        # the tokens, the product, and the tokens normed and modulated, which the next region reads
        aten = torch.ops.aten
        targets = [node.target for node in segment.outputs]
        assert targets == [aten.add.Tensor, aten.linear.default, aten.add.Tensor]


def test_what_depends_on_the_latents_is_made_once() -> None:
    found = dit(layers=4)
    partition = partition_of(found)
    graph = partition.segments[0].nodes[0].graph
    (latents,) = (n for n in graph.nodes if n.op == "placeholder" and n.meta["val"].shape == (4, 4, 8, 8))
    tokens = {node for node in descendants([latents]) if node.op == "call_function"}
    sums = [node for segment in partition.segments for node in segment.nodes if node in tokens]
    assert len(sums) == len(set(sums)) == len(tokens)


def test_without_the_latents_nothing_moves() -> None:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    place: dict[fx.Node, int] = {}
    assert sinking.sink(graph, place, [], ()) == []


@pytest.mark.parametrize("build", [lambda: dit(layers=3, cfg_order="uncond_first"), pixart])
def test_plans_agree_with_the_oracle(build) -> None:
    found = build()
    plan = make_plan(found, ROWS, window=8)
    calls = found.generation(plan.steps)
    for ours, theirs in zip(run(compiled(found, plan), calls), Oracle(found.model, plan).run(calls), strict=True):
        assert relative(ours, tensor_of(theirs)) < 1e-4


def test_large_parts_are_copied(monkeypatch) -> None:
    found = dit(layers=4)
    monkeypatch.setattr(sinking, "_SMALL", 0)
    partition = partition_of(found)
    assert max(len(segment.outputs) for segment in partition.segments) > 2
    assert min(sizes(partition.segments[2].outputs)) < max(sizes(partition.segments[2].outputs))
