"""cfg_shared: a site computes the conditional half of the batch and uses the result for both halves.

Before::

    h_BND -> linear q, k, v -> attention -> linear -> y_BND

After, with C = B / 2::

    h_BND -> cfg_half -> linear q, k, v -> attention -> linear -> y_CND -> cfg_shared -> y_BND

The whole region is computed for the half, projections included.  Its nodes are copied with the literal sizes
that name the batch rewritten; side inputs that meet the batch are halved (:mod:`difa_fx.passes.batch_axis`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from difa_fx import attention
from difa_fx.passes.batch_axis import follow
from difa_fx.passes.batch_step import Step
from difa_fx.passes.graph_tools import evaluate
from difa_fx.passes.sites import AttentionSite

aten = torch.ops.aten

_RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}


def cfg_shared(graph: fx.Graph, site: AttentionSite, *, second: bool) -> AttentionSite:
    """Rewrite the region of ``site`` to the conditional half of the batch.

    Args:
        graph: a block's graph, edited in place.
        second: whether the conditional half is the second one.

    Returns:
        The site at half batch, in the same graph; what read its output reads both halves made from it.
    """
    halver = _Halver(graph, site.axes, second)
    last = site.region[-1]
    with graph.inserting_before(last):
        for node in site.region:
            halver.copy(node)
    for output, axis in zip(site.outputs, site.output_axes, strict=True):
        with graph.inserting_before(last):
            shared = graph.call_function(attention.cfg_shared, (halver.copies[output],), {"axis": axis})
        output.replace_all_uses_with(shared)
    new = {**halver.halves, **halver.copies}
    return replace(
        site,
        call=site.call.moved(new),
        sources=tuple(new.get(source, source) for source in site.sources),
        outputs=tuple(new[output] for output in site.outputs),
        region=tuple(new[node] for node in site.region),
        axes={},
    )


class _Halver:
    """Copies a region node by node, each for half the batch."""

    def __init__(self, graph: fx.Graph, axes: Mapping[fx.Node, int], second: bool) -> None:
        self.graph, self.axes, self.second = graph, axes, second
        self.copies: dict[fx.Node, fx.Node] = {}
        self.halves: dict[fx.Node, fx.Node] = {}

    def copy(self, node: fx.Node) -> None:
        step = follow(node, self.axes)
        if step is None:
            self.copies[node] = self.graph.node_copy(node, lambda n: self.copies.get(n, n))
            return
        copied = self.graph.node_copy(node, lambda n: self._at_half(n, step))
        _set_sizes(copied, node, step)
        evaluate(copied)
        self.copies[node] = copied

    def _at_half(self, source: fx.Node, step: Step) -> fx.Node:
        if source in self.copies:
            return self.copies[source]
        axis = step.aligned.get(source, self.axes.get(source))
        if axis is None:
            return source
        if source not in self.halves:
            settings: dict[str, Any] = {"axis": axis, "second": self.second}
            self.halves[source] = self.graph.call_function(attention.cfg_half, (source,), settings)
            evaluate(self.halves[source])
        return self.halves[source]


def _set_sizes(copied: fx.Node, node: fx.Node, step: Step) -> None:
    """Write the literal sizes of half a batch into a copied node.

    A view may not exist on a half that is a slice, so every operation that keeps the flat order becomes a
    reshape.
    """
    if node.target in _RESHAPES:
        copied.target = aten.reshape.default
        copied.args, copied.kwargs = (copied.args[0], step.sizes["size"]), {}
    elif node.target is aten.expand.default:
        copied.args = (copied.args[0], step.sizes["size"])
    elif "output_size" in step.sizes and node.kwargs.get("output_size") is not None:
        copied.kwargs = {**copied.kwargs, "output_size": step.sizes["output_size"]}
