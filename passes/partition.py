"""partition: the graph cut at the sites, with equal layers made equal.

Glossary.  A *region* is what a site computes, from what its projections read to its output.  A *trunk* is what lies
between two regions: the rest of one block, and the norm that the next begins with.  They alternate::

    trunk 0 | region 0 | trunk 1 | region 1 | ... | trunk n

Both are *segments*; each becomes one or more pieces.  A plan changes regions and, but for what nothing reads at a step,
never a trunk: a step that reuses a site's output does not call its region at all.
A segment's *signature* is its structure without names: operations, constants, and the shape, stride, dtype and
device of its inputs, parameters included.  Segments with one signature share their pieces; a denoiser of 28 equal
layers has one region and one trunk signature besides its first and last trunk, not 28 of each.

Position in the trace, not the module path, says which trunk a node belongs to.  Two things would still make equal
layers differ and are undone here: an expression that several trunks compute alike from the same inputs (a sinusoid
of the timestep), and one that the first block owns but others read.  Both move to trunk 0.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from difa_fx.passes.canonicalize import CanonicalGraph
from difa_fx.passes.graph_tools import ancestors, calls, crossing_value, described, output_values, placeholders, spelled
from difa_fx.passes.sinking import sink
from difa_fx.passes.sites import Attention, AttentionSite


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One run of the canonical graph.

    Attributes:
        name: ``trunk 3``, or the path of the site.
        site: the site whose region it is; None for a trunk.
        nodes: what it computes, in graph order.
        inputs: nodes of earlier segments and placeholders that it reads, in order of first use.
        outputs: its nodes that later segments or the graph's output read, in graph order.
        returned: those of the outputs that the graph itself returns; they keep their layout.
        signature: digest of its structure.
    """

    name: str
    site: AttentionSite | None
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    returned: frozenset[fx.Node]
    signature: str

    def __post_init__(self) -> None:
        assert self.site is None or set(self.outputs) <= set(self.site.outputs), "a region yields its outputs alone"


@dataclass(frozen=True, slots=True)
class Partition:
    """All segments in the order in which they run; together they compute every node once."""

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        done: set[fx.Node] = set()
        for segment in self.segments:
            assert not done.intersection(segment.nodes), "a node lies in one segment"
            for node in segment.inputs:
                assert node in done or node.op == "placeholder", f"{node} is read before it is computed"
            done.update(segment.nodes)

    @property
    def unique(self) -> tuple[Segment, ...]:
        """The first segment of each signature."""
        return tuple({s.signature: s for s in reversed(self.segments)}.values())[::-1]

    @property
    def unique_blocks(self) -> tuple[Segment, ...]:
        """The structurally different segments of the repeated part: all but the first and last trunk."""
        ends = {id(self.segments[0]), id(self.segments[-1])}
        inner = [s for s in self.segments if id(s) not in ends or s.site is not None]
        return tuple({s.signature: s for s in reversed(inner)}.values())[::-1]


def partition(canonical: CanonicalGraph, attention: Attention) -> Partition:
    """Cut a canonical graph at the sites of ``attention``; its nodes are put in the order of the segments."""
    graph = canonical.gm.graph
    place = _assign(graph, [_closed_region(site) for site in attention.sites])
    merged = _hoist_shared(graph, place)
    sites = [replace(site, call=site.call.moved(merged)) for site in attention.sites]
    inputs = placeholders(graph)
    sites = sink(graph, place, sites, [inputs[position] for position in attention.inputs.samples])
    _sort(graph, place)
    returned = {node for node in output_values(graph) if isinstance(node, fx.Node)}
    members: dict[int, list[fx.Node]] = {}
    for node in calls(graph):
        members.setdefault(place[node], []).append(node)
    segments = []
    for number in sorted(members):
        site = sites[number // 2] if number % 2 else None
        outputs = [
            node
            for node in members[number]
            if node in returned or any(place.get(user, number) != number for user in node.users)
        ]
        segments.append(_segment(f"trunk {number // 2}", site, members[number], outputs, returned))
    return Partition(tuple(segments))


def _closed_region(site: AttentionSite) -> set[fx.Node]:
    """The part of a site's region that nothing outside reads, but for its output.

    A key or value that is read elsewhere too is left to the trunk, with all that it is computed from.
    """
    region = set(site.region)
    leaking = [n for n in region if n not in site.outputs and not region.issuperset(n.users)]
    return region - ancestors(leaking) if leaking else region


def _assign(graph: fx.Graph, regions: Sequence[set[fx.Node]]) -> dict[fx.Node, int]:
    """Number of each node's segment: 2 i for trunk i, 2 i + 1 for region i."""
    owner = {node: i for i, region in enumerate(regions) for node in region}
    left = [len(region) for region in regions]
    place: dict[fx.Node, int] = {}
    done = 0
    for node in calls(graph):
        if node in owner:
            index = owner[node]
            place[node] = 2 * index + 1
            left[index] -= 1
            if not left[index]:
                done = max(done, 2 * index + 2)
            continue
        after = max((place[n] for n in node.all_input_nodes if n in place), default=0)
        place[node] = max(done, after + after % 2)
    return place


def _hoist_shared(graph: fx.Graph, place: dict[fx.Node, int]) -> dict[fx.Node, fx.Node]:
    """Move what several trunks share to trunk 0, and merge what they compute alike; gives what stands for what."""
    merged: dict[fx.Node, fx.Node] = {}
    numbers = _value_numbers(graph, place)
    owners: dict[int, set[int]] = {}
    for node, number in numbers.items():
        owners.setdefault(number, set()).add(place[node])
    last = max(place.values(), default=0)
    first: dict[int, fx.Node] = {}
    for node in list(numbers):
        number = numbers[node]
        if len(owners[number] - {0, last}) < 2:
            continue
        if number in first:
            node.replace_all_uses_with(first[number])
            merged[node] = first[number]
            graph.erase_node(node)
            del place[node]
        else:
            first[number] = node
            place[node] = 0
    for node in reversed(list(calls(graph))):
        readers = {place[user] for user in node.users if user in place}
        if place[node] % 2 == 0 and len(readers - {place[node], place[node] + 1}) > 1:
            _hoist(node, place)
    for node in calls(graph):
        if node.target is operator.getitem:
            place[node] = place[node.all_input_nodes[0]]
    return merged


def _hoist(node: fx.Node, place: dict[fx.Node, int]) -> None:
    """Move ``node`` and what it needs to trunk 0, if none of it depends on a region."""
    needed = [n for n in ancestors([node]) if n in place]
    if all(place[n] % 2 == 0 for n in needed) and not any(
        place.get(source, 0) % 2 for n in needed for source in n.all_input_nodes
    ):
        place.update(dict.fromkeys(needed, 0))


def _value_numbers(graph: fx.Graph, place: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
    """Equal numbers for pure trunk nodes that compute the same from the same inputs."""
    numbers: dict[fx.Node, int] = {}
    table: dict[Any, int] = {}
    for node in calls(graph):
        target = node.target
        random = isinstance(target, torch._ops.OpOverload) and (torch.Tag.nondeterministic_seeded in target.tags)
        known = all(n.op == "placeholder" or n in numbers for n in node.all_input_nodes)
        if random or not known or place[node] % 2:
            continue
        key = (node.op, str(target), spelled(node, lambda n: numbers.get(n, n.name)))
        numbers[node] = table.setdefault(key, len(table))
    return numbers


def _sort(graph: fx.Graph, place: Mapping[fx.Node, int]) -> None:
    """Put the nodes in the order of their segments, keeping the order within each."""
    end = graph.output_node()
    for node in sorted(calls(graph), key=place.__getitem__):
        end.prepend(node)
    graph.lint()


def _segment(
    name: str,
    site: AttentionSite | None,
    nodes: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    returned: Set[fx.Node],
) -> Segment:
    own = set(nodes)
    read = dict.fromkeys(s for node in nodes for s in node.all_input_nodes if s not in own)
    return Segment(
        name=site.path if site is not None else name,
        site=site,
        nodes=tuple(nodes),
        inputs=tuple(read),
        outputs=tuple(outputs),
        returned=frozenset(returned & set(outputs)),
        signature=_signature(nodes, tuple(read), outputs, returned),
    )


def _signature(
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    returned: Set[fx.Node],
) -> str:
    index: dict[fx.Node, str] = {node: f"i{i}" for i, node in enumerate(inputs)}
    index |= {node: f"n{i}" for i, node in enumerate(nodes)}
    parts: list[Any] = [[described(crossing_value(node)) for node in inputs]]
    parts += [(node.op, str(node.target), spelled(node, index.__getitem__)) for node in nodes]
    parts.append([(index[node], node in returned) for node in outputs])
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def extract(segment: Segment) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A segment as a graph of its own, inputs and outputs in the segment's order, and old node to new."""
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in segment.inputs:
        nodes[node] = graph.placeholder(node.name)
        nodes[node].meta = {"val": crossing_value(node)}
    for node in segment.nodes:
        nodes[node] = graph.node_copy(node, nodes.__getitem__)
    graph.output(tuple(nodes[node] for node in segment.outputs))
    graph.lint()
    owner = segment.nodes[0].graph.owning_module
    return fx.GraphModule(owner if owner is not None else torch.nn.Module(), graph), nodes
