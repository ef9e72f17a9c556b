"""window_attention: full attention gives way to a band plus the residual stored at a full step.

Before::

    q, k, v -> scaled_dot_product_attention -> ...

After, at a window step::

    q, k, v -> window_attention -> add_residual(residual_in) -> ...

After, at a full step whose residual a later step reads::

    q, k, v -> scaled_dot_product_attention -> ...
            -> window_attention -> residual -> (handed out)
"""

from __future__ import annotations

from torch import fx

from difa_fx import attention
from difa_fx.passes.find_attention import AttentionSite
from difa_fx.passes.graph_tools import arg, shape_of, tensor_of


def window_attention(
    graph: fx.Graph,
    site: AttentionSite,
    stored: fx.Node,
    *,
    window: int,
    kernel: str,
    shared_axis: int | None,
) -> fx.Node:
    """Replace the anchor of ``site`` by window attention plus ``stored``; returns the sum's node.

    Args:
        graph: a block's graph, edited in place.
        stored: the placeholder of the residual, [B, N, H, D].
        window: tokens to either side.
        kernel: the ``window_kernel`` option.
        shared_axis: the batch axis when the residual holds the conditional half alone, else None.
    """
    with graph.inserting_before(site.anchor):
        banded = _banded(graph, site, window, kernel)
        if shared_axis is not None:
            stored = graph.call_function(attention.cfg_shared, (stored,), {"axis": shared_axis})
        summed = graph.call_function(attention.add_residual, (banded, stored))
    site.anchor.replace_all_uses_with(summed)
    return summed


def window_residual(graph: fx.Graph, site: AttentionSite, *, window: int, kernel: str) -> fx.Node:
    """Full minus window attention of ``site``, [B, N, H, D], as a new node that nothing reads yet."""
    with graph.inserting_after(site.anchor):
        missed = graph.call_function(attention.residual, (site.anchor, site.anchor))
    with graph.inserting_before(missed):
        missed.args = (site.anchor, _banded(graph, site, window, kernel))
    return missed


def _banded(graph: fx.Graph, site: AttentionSite, window: int, kernel: str) -> fx.Node:
    anchor = site.anchor
    mask = arg(anchor, "attn_mask")
    q = anchor.args[0]
    assert isinstance(q, fx.Node)
    value = tensor_of(q)
    assert value is not None
    chosen = attention.choose_kernel(
        kernel,
        device=value.device.type,
        tokens=shape_of(q)[-2],
        window=window,
        masked=mask is not None,
    )
    settings = {"window": window, "scale": arg(anchor, "scale"), "kernel": chosen}
    return graph.call_function(attention.window_attention, (*anchor.args[:3], mask), settings)
