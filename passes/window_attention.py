"""window_attention: full attention gives way to a band plus the residual stored at a full step.

Before::

    q, k, v -> scaled_dot_product_attention -> ...

After, at a window step::

    q, k, v, residual_in -> window_attention -> ...

After, at a full step whose residual a later step reads::

    q, k, v -> scaled_dot_product_attention -> ...
    q, k, v, its result  -> window_residual -> (handed out)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

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
    """Replace the anchor of ``site`` by window attention plus ``stored``; returns its node.

    Args:
        graph: a block's graph, edited in place.
        stored: the placeholder of the residual, [B, N, H, D].
        window: tokens to either side.
        kernel: the ``window_kernel`` option.
        shared_axis: the batch axis when the residual holds the conditional half alone, else None.
    """
    with graph.inserting_before(site.anchor):
        if shared_axis is not None:
            stored = graph.call_function(attention.cfg_shared, (stored,), {"axis": shared_axis})
        args, settings = _banded(graph, site, window, kernel)
        node = graph.call_function(attention.window_attention, args, settings | {"residual_BNHD": stored})
    site.anchor.replace_all_uses_with(node)
    return node


def window_residual(graph: fx.Graph, site: AttentionSite, *, window: int, kernel: str) -> fx.Node:
    """Full minus window attention of ``site``, [B, N, H, D], as a new node that nothing reads yet."""
    with graph.inserting_before(site.anchor.next):
        args, settings = _banded(graph, site, window, kernel)
        return graph.call_function(attention.window_residual, (site.anchor, *args), settings)


def _banded(graph: fx.Graph, site: AttentionSite, window: int, kernel: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What both functions take: queries, keys, values, mask and the band's constants; and the settings."""
    anchor = site.anchor
    mask = arg(anchor, "attn_mask")
    q = anchor.args[0]
    assert isinstance(q, fx.Node)
    value = tensor_of(q)
    assert value is not None
    tokens = shape_of(q)[-2]
    chosen = attention.choose_kernel(kernel, like=value, tokens=tokens, window=window, masked=mask is not None)
    tensors = attention.band_tensors(chosen, tokens=tokens, window=window, like=_real_like(value))
    band = [_constant(graph, f"band_{window}_{i}", tensor) for i, tensor in enumerate(tensors)]
    settings = {"window": window, "scale": arg(anchor, "scale"), "kernel": chosen}
    return (*anchor.args[:3], mask, *band), settings


def _real_like(value: Tensor) -> Tensor:
    """An empty real tensor of the dtype and device of a fake one."""
    return torch.empty(0, dtype=value.dtype, device=value.device)


def _constant(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    """``value`` as a buffer of the graph's module, read by a new node."""
    module = graph.owning_module
    assert module is not None
    if not hasattr(module, name):
        module.register_buffer(name, value, persistent=False)
    return graph.get_attr(name)
