"""sinking: small tensors that are cheap to make are made where they are read, and do not cross segments.

A block computes its shifts, scales and gates by one product, and parts it.  Handed from segment to segment each part
would be copied by a kernel of its own, since what crosses is contiguous; handed over whole, it is parted where it is
read, inside the kernels that read it::

    trunk 3: e = linear(t); s, g = split(e)       trunk 3: e = linear(t)
    region 3: ... * (1 + s)                  ->   region 3: s, _ = split(e); ... * (1 + s)
    trunk 4: ... * g                              trunk 4: _, g = split(e); ... * g
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, fx

from difa_fx.passes.graph_tools import calls, descendants
from difa_fx.passes.sites import AttentionSite

aten = torch.ops.aten

_CHEAP: Final = frozenset(
    {
        operator.getitem,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        aten.slice.Tensor,
        aten.select.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.reshape.default,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.neg.default,
        aten.to.dtype,
        aten._to_copy.default,
    }
)
"""Views, and what a reader's kernel computes on the way."""

_SMALL: Final = 2**20
"""Bytes.  What is larger is worth a copy: whoever reads a part of it would keep all of it alive."""


def sink(
    graph: fx.Graph, place: dict[fx.Node, int], sites: Sequence[AttentionSite], latents: Sequence[fx.Node]
) -> list[AttentionSite]:
    """Move what is small and cheap in trunks to its readers, each of which gets a copy; gives the sites anew.

    What depends on the latents stays: the tokens' own sums would be made again from those of all blocks before.

    Args:
        graph: edited in place.
        place: the segment of each node: even for trunks, odd for regions; kept up to date.
        sites: one a region, in order.
        latents: their placeholders; none where they are not known, and then nothing moves.
    """
    if not latents:
        return list(sites)
    copies: list[dict[fx.Node, fx.Node]] = [{} for _ in sites]
    moving = descendants(latents)
    made: set[fx.Node] = set()
    for node in reversed(list(calls(graph))):
        if place[node] % 2 or node in moving or not _is_cheap(node):
            continue
        for number, readers in _readers(node, place).items():
            if number % 2 and node in sites[number // 2].sources:
                continue
            copied = _copy_for(node, readers)
            made.add(copied)
            place[copied] = number
            if number % 2:
                copies[number // 2][node] = copied
        if not node.users:
            graph.erase_node(node)
            del place[node]
    _settle(graph, made)
    return [_reading(site, copied) for site, copied in zip(sites, copies, strict=True)]


def _copy_for(node: fx.Node, readers: Sequence[fx.Node]) -> fx.Node:
    """A copy of ``node`` that ``readers`` read in its place."""
    with node.graph.inserting_before(node):
        copied = node.graph.node_copy(node)
    for reader in readers:
        reader.replace_input_with(node, copied)
    return copied


def _reading(site: AttentionSite, copies: Mapping[fx.Node, fx.Node]) -> AttentionSite:
    """``site`` with what was copied into its region; a mask may be."""
    axes = {copied: site.axes[node] for node, copied in copies.items() if node in site.axes}
    return replace(site, axes={**site.axes, **axes}, call=site.call.moved(copies))


def _settle(graph: fx.Graph, made: set[fx.Node]) -> None:
    """Put each of the nodes that were ``made`` before its first reader, in an order that equal layers share."""
    waiting = set(made)

    def settle(node: fx.Node, reader: fx.Node) -> None:
        if node in waiting:
            waiting.remove(node)
            for source in node.all_input_nodes:
                settle(source, reader)
            reader.prepend(node)

    for reader in [node for node in graph.nodes if node not in made]:
        for source in reader.all_input_nodes:
            settle(source, reader)


def _readers(node: fx.Node, place: dict[fx.Node, int]) -> dict[int, list[fx.Node]]:
    """What reads ``node`` in other segments, by segment."""
    found: dict[int, list[fx.Node]] = {}
    for user in node.users:
        if user in place and place[user] != place[node]:
            found.setdefault(place[user], []).append(user)
    return found


def _is_cheap(node: fx.Node) -> bool:
    return node.target in _CHEAP and all(_is_small(n.meta.get("val")) for n in (node, *node.all_input_nodes))


def _is_small(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_small(item) for item in value)
    return isinstance(value, Tensor) and value.numel() * value.element_size() <= _SMALL
