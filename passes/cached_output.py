"""cached_output: a site's region gives way to the output it had at an earlier step.

Before::

    h -> norm -> linear q, k, v -> attention -> linear -> y -> gate, residual -> ...

After::

    output_in -> cached_output -> y -> gate, residual -> ...

Everything that nothing else reads - projections, norm, modulation - is dead then and leaves the graph.
"""

from __future__ import annotations

from torch import fx

from difa_fx import attention
from difa_fx.passes.find_attention import AttentionSite


def cached_output(graph: fx.Graph, site: AttentionSite, state: fx.Node, *, shared_axis: int | None) -> fx.Node:
    """Replace the output of ``site`` by ``state``; returns the node that stands for it.

    Args:
        graph: a block's graph, edited in place.
        state: the placeholder of the stored output.
        shared_axis: the batch axis when the state holds the conditional half alone, else None.
    """
    with graph.inserting_before(site.output):
        node = graph.call_function(attention.cached_output, (state,))
        if shared_axis is not None:
            node = graph.call_function(attention.cfg_shared, (node,), {"axis": shared_axis})
    site.output.replace_all_uses_with(node)
    return node
