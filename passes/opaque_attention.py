"""Attention as an operator of some library: flash-attn's, xformers', SageAttention's, anybody's.

Read from the operator's own schema: it takes queries, keys and values by these names and gives something of the
queries' shape.  What else it was asked to do - a causal mask, a window, slopes - decides what a plan may make of it.

Letters: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from difa_fx.passes.attention_call import AttentionCall, Layout
from difa_fx.passes.graph_tools import arg, shape_of, tensor_of

aten = torch.ops.aten

_QUERY, _KEY, _VALUE = ("q", "query", "queries"), ("k", "key", "keys"), ("v", "value", "values")
_SCALE = ("scale", "softmax_scale", "sm_scale")
_MASK = ("attn_mask", "attn_bias", "bias", "mask", "attention_mask")
_CAUSAL = ("is_causal", "causal")
_DROPOUT = ("dropout_p", "p", "dropout")
_TOKENS_FIRST = ("NHD", "BSHD", "BNHD", "BMHK")
_HEADS_FIRST = ("HND", "BHSD", "BHND")


def is_opaque_attention(node: fx.Node) -> bool:
    """Whether ``node`` is an operator of some library that takes q, k and v by these names."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace == "aten":
        return False
    given = [_named(node, names) for names in (_QUERY, _KEY, _VALUE)]
    return all(isinstance(n, fx.Node) and tensor_of(n) is not None for n in given)


def opaque_attention(node: fx.Node) -> AttentionCall | None:
    """An operator that takes q, k and v by these names and gives something of the queries' shape."""
    q, k, v = (_named(node, names) for names in (_QUERY, _KEY, _VALUE))
    result = node
    if tensor_of(node) is None:
        firsts = [user for user in node.users if user.args[1:] == (0,)]
        if len(firsts) != 1:
            return None
        (result,) = firsts
    if shape_of(result)[:-1] != shape_of(q)[:-1]:
        return None
    layout, refused = _opaque_layout(node, q, k)
    mask, scale = _named(node, _MASK), _named(node, _SCALE)
    return AttentionCall(
        q,
        k,
        v,
        result,
        layout,
        mask=mask if isinstance(mask, fx.Node) else None,
        scale=scale if isinstance(scale, (int, float)) else None,
        refused=refused or _opaque_refusal(node),
    )


def _opaque_refusal(node: fx.Node) -> str:
    """What an operator was asked to do beyond plain attention."""
    sides = [_named(node, (side,)) for side in ("window_size_left", "window_size_right")]
    reasons = {
        "it is causal": bool(_named(node, _CAUSAL)),
        "it has dropout": bool(_named(node, _DROPOUT)),
        "it has a window of its own": any(side not in (None, -1) for side in sides),
        "it changes the scores in a way of its own": _named(node, ("alibi_slopes",)) is not None
        or bool(_named(node, ("softcap",))),
        "its mask is no tensor": not isinstance(_named(node, _MASK), fx.Node | None),
        "its scale is no constant": not isinstance(_named(node, _SCALE), int | float | None),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _named(node: fx.Node, names: Iterable[str]) -> Any:
    """The argument of an operator that has one of ``names``; None without."""
    schema = node.target._schema  # type: ignore[union-attr]
    known = {argument.name.lower(): argument.name for argument in schema.arguments}
    return next((arg(node, known[name]) for name in names if name in known), None)


def _opaque_layout(node: fx.Node, q: fx.Node, k: fx.Node) -> tuple[Layout, str]:
    """Which axis has the tokens: said by an argument, else told by how the queries were made."""
    if len(shape_of(q)) != 4:
        return "BND", "" if len(shape_of(q)) == 3 else f"its queries have {len(shape_of(q))} axes"
    said = str(_named(node, ("tensor_layout", "layout", "qkv_format")) or "").upper()
    if said in _TOKENS_FIRST:
        return "BNHD", ""
    if said in _HEADS_FIRST:
        return "BHND", ""
    if shape_of(q)[1] != shape_of(k)[1] and shape_of(q)[2] == shape_of(k)[2]:
        return "BNHD", ""
    swapped = any(n.target in (aten.transpose.int, aten.permute.default) for n in _until_projection(q))
    return ("BHND" if swapped else "BNHD"), ""


def _until_projection(start: fx.Node) -> Iterator[fx.Node]:
    """Nodes above ``start`` that only move or scale it."""
    node = start
    while node.op == "call_function" and node.target is not aten.linear.default and node.all_input_nodes:
        yield node
        node = node.all_input_nodes[0]
