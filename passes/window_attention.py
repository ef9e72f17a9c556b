"""window_attention: full attention gives way to a window plus the residual stored at a full step.

Before::

    q, k, v -> scaled_dot_product_attention -> ...

After, at a window step::

    q, k, v, residual_in -> window_attention -> ...

After, at a full step whose residual a later step reads::

    q, k, v -> refreshed_attention -> ..., (handed out)

or, where the kernel cannot give both at once::

    q, k, v -> scaled_dot_product_attention -> ...
    q, k, v, its result  -> window_residual -> (handed out)

However the model spells its attention, the window's takes and gives [B, H, N, D]; what turns the one into the other
are views.  Where no residual is read, full attention stays as the model has it.
"""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from difa_fx import attention
from difa_fx.kernel_race import chosen_kernel
from difa_fx.passes.attention_call import AttentionCall
from difa_fx.passes.graph_tools import evaluate, shape_of, tensor_of
from difa_fx.passes.sites import AttentionSite
from difa_fx.plan import Method, Window

aten = torch.ops.aten


def window_attention(
    graph: fx.Graph,
    site: AttentionSite,
    stored: fx.Node,
    *,
    window: Window,
    kernel: str,
    shared_axis: int | None,
) -> fx.Node:
    """Let a window and ``stored`` stand for the attention of ``site``; returns the node that takes its place.

    Args:
        graph: a block's graph, edited in place.
        stored: the placeholder of the residual, [B, N, H, D].
        window: how far tokens see.
        kernel: the ``window_kernel`` option.
        shared_axis: the batch axis when the residual holds the conditional half alone, else None.
    """
    result = site.call.result
    with graph.inserting_before(result):
        if shared_axis is not None:
            stored = graph.call_function(attention.cfg_shared, (stored,), {"axis": shared_axis})
        args, settings = _windowed(graph, site, window, kernel)
        node = graph.call_function(attention.window_attention, args, settings | {"residual_BNHD": stored})
        node.meta["val"] = args[0].meta["val"]
        node = _as_before(graph, site.call, node)
    result.replace_all_uses_with(node)
    return node


def window_residual(graph: fx.Graph, site: AttentionSite, *, window: Window, kernel: str) -> fx.Node:
    """Full minus window attention of ``site``, [B, N, H, D], as a new node that nothing reads yet."""
    with graph.inserting_before(site.call.result.next):
        args, settings = _windowed(graph, site, window, kernel, refresh=True)
        if settings.pop("at_once"):
            return _refreshed(graph, site, args, settings)
        full = _heads_first(graph, site.call, site.call.result, transposed=site.call.values_transposed)
        return graph.call_function(attention.window_residual, (full, *args), settings)


def _refreshed(graph: fx.Graph, site: AttentionSite, args: tuple[Any, ...], settings: dict[str, Any]) -> fx.Node:
    """Full attention and the residual from one node; the model's own attention is left without a reader."""
    q, k, v, _, *constants = args
    both = graph.call_function(attention.refreshed_attention, (q, k, v, *constants), settings)
    full, missed = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
    full.meta["val"] = q.meta["val"]
    site.call.result.replace_all_uses_with(_as_before(graph, site.call, full))
    return missed


def fitted(site: AttentionSite, window: Window, *, calls_per_step: int = 1) -> AttentionSite:
    """``site`` with the methods refused that it cannot do under a plan's window and guidance.

    Where the halves of guidance are two calls, no half of a batch is taken, and what the batch forbids is possible.
    """
    refused = dict(site.refused)
    if calls_per_step == 2:
        refused = {m: why for m, why in refused.items() if not m.shares_cfg}
    tokens = site.shape.tokens - sum(site.text)
    if not isinstance(window, int) and math.prod(window.grid) != tokens:
        reason = f"the window's grid {window.grid} has {math.prod(window.grid)} tokens, and the site {tokens}"
        refused.setdefault(Method.WINDOW, reason)
    if Method.WINDOW in refused:
        refused.setdefault(Method.WINDOW_CFG, refused[Method.WINDOW])
    return replace(site, refused=refused)


def _windowed(
    graph: fx.Graph, site: AttentionSite, window: Window, kernel: str, *, refresh: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the functions take: queries, keys, values, mask and the window's constants; and the settings.

    For a ``refresh`` the settings say, too, whether one kernel gives both results (``at_once``).
    """
    call = site.call
    q = _heads_first(graph, call, call.q)
    k = _heads_first(graph, call, call.k, transposed=call.keys_transposed)
    v = _heads_first(graph, call, call.v, transposed=call.values_transposed)
    queries, shared = call.heads
    if queries != shared:
        k, v = (_added(graph, aten.repeat_interleave.self_int, n, queries // shared, 1) for n in (k, v))
    mask = None if call.mask is None else _mask(graph, call)
    like = _real_like(tensor_of(q))
    tokens = site.shape.tokens - sum(site.text)
    grid, size = ((tokens,), (window,)) if isinstance(window, int) else (window.grid, window.size)
    shape: dict[str, Any] = {"grid": grid, "size": size, "text": site.text}
    masked = mask is not None
    chosen = chosen_kernel(kernel, like=like, sizes=shape_of(q), masked=masked, refresh=refresh, **shape)
    at_once = refresh and attention.refreshes_at_once(chosen, like=like)
    make = attention.refresh_tensors if at_once else attention.window_tensors
    name = "_".join(map(str, ("refresh" if at_once else "window", *grid, *size, *site.text)))
    constants = [_constant(graph, f"{name}_{i}", tensor) for i, tensor in enumerate(make(chosen, like=like, **shape))]
    settings = shape | {"scale": call.scale, "kernel": chosen} | ({"at_once": at_once} if refresh else {})
    return (q, k, v, mask, *constants), settings


def _heads_first(graph: fx.Graph, call: AttentionCall, node: fx.Node, *, transposed: bool = False) -> fx.Node:
    """``node``, which is in the layout of ``call``, as [B, H, N, D]."""
    if transposed:
        node = _added(graph, aten.transpose.int, node, -2, -1)
    if call.layout == "BNHD":
        return _added(graph, aten.transpose.int, node, 1, 2)
    value = tensor_of(node)
    assert value is not None
    for _ in range(4 - value.ndim):
        node = _added(graph, aten.unsqueeze.default, node, 0)
    return node


def _as_before(graph: fx.Graph, call: AttentionCall, node: fx.Node) -> fx.Node:
    """The result as the model's own attention would yield it."""
    want = tensor_of(call.result)
    assert want is not None
    if call.layout == "BNHD":
        node = _added(graph, aten.transpose.int, node, 1, 2)
    if call.values_transposed:
        node = _added(graph, aten.transpose.int, node, -2, -1)
    for _ in range(4 - want.ndim):
        node = _added(graph, aten.squeeze.dim, node, 0)
    value = tensor_of(node)
    assert value is not None
    return node if value.dtype == want.dtype else _added(graph, aten.to.dtype, node, want.dtype)


def _mask(graph: fx.Graph, call: AttentionCall) -> fx.Node:
    """The model's own mask, as something to add to scores or as bool, with the four axes of scores."""
    q, mask = tensor_of(call.q), call.mask
    assert q is not None and mask is not None
    if call.filled is not None:
        where, score = call.filled
        sides = (score, 0.0) if where else (0.0, score)
        mask = _added(graph, aten.where.Scalar, mask, *sides)
    value = cast(Tensor, mask.meta["val"])
    while value.ndim < 4:
        mask = _added(graph, aten.unsqueeze.default, mask, 0)
        value = cast(Tensor, mask.meta["val"])
    exact = value.dtype in (torch.bool, q.dtype)
    return mask if exact else _added(graph, aten.to.dtype, mask, q.dtype)


def _added(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    evaluate(node)
    return node


def _real_like(value: Tensor | None) -> Tensor:
    """An empty real tensor of the dtype and device of a fake one."""
    assert value is not None
    return torch.empty(0, dtype=value.dtype, device=value.device)


def _constant(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    """``value`` as a buffer of the graph's module, read by a new node."""
    module = graph.owning_module
    assert module is not None
    if not hasattr(module, name):
        module.register_buffer(name, value, persistent=False)
    return graph.get_attr(name)
