"""cached_output: a site's region gives way to the output it had at an earlier step.

Before::

    h -> linear q, k, v -> attention -> linear -> y -> gate, residual -> ...

After::

    output_in -> cached_output -> y -> gate, residual -> ...

A joint attention has two outputs, and each gives way to its own.  Everything that nothing else reads - projections, and
the norm and modulation before them - is dead then and leaves the graph.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from difa_fx import attention
from difa_fx.passes.sites import AttentionSite


def cached_output(
    graph: fx.Graph, site: AttentionSite, states: Sequence[fx.Node], *, shared_axes: Sequence[int] | None
) -> None:
    """Replace each output of ``site`` by its state.

    Args:
        graph: a block's graph, edited in place.
        states: the placeholders of the stored outputs.
        shared_axes: the batch axes when the states hold the conditional half alone, else None.
    """
    for index, (output, state) in enumerate(zip(site.outputs, states, strict=True)):
        with graph.inserting_before(output):
            node = graph.call_function(attention.cached_output, (state,))
            if shared_axes is not None:
                node = graph.call_function(attention.cfg_shared, (node,), {"axis": shared_axes[index]})
        output.replace_all_uses_with(node)
