"""Attention as an operator of some library: flash-attn's, xformers', SageAttention's, anybody's.

Read from the operator's own schema: it takes queries, keys and values by these names and gives something of the
queries' shape.  What else it was asked to do - a causal mask, a window, slopes - decides what a plan may make of it.
Nothing is guessed: the order of the axes is said by an argument, documented by the library, or followed from the
projection (:mod:`difa_fx.passes.head_axes`), and a tensor argument that is not understood refuses windows and halves.

Letters: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from difa_fx.passes.attention_call import AttentionCall, Layout
from difa_fx.passes.graph_tools import arg, is_library_operator, shape_of, tensor_of
from difa_fx.passes.head_axes import head_axis

_QUERY, _KEY, _VALUE = ("q", "query", "queries"), ("k", "key", "keys"), ("v", "value", "values")
_SCALE = ("scale", "softmax_scale", "sm_scale")
_MASK = ("attn_mask", "attn_bias", "bias", "mask", "attention_mask")
_CAUSAL = ("is_causal", "causal")
_DROPOUT = ("dropout_p", "p", "dropout")
_LIBRARIES = ("flash_attn", "xformers", "aiter", "fa3", "hopper")
"""Beginnings of namespaces whose operators take [B, N, H, D], as their documentation says."""
_TOKENS_FIRST = ("NHD", "BSHD", "BNHD", "BMHK")
_HEADS_FIRST = ("HND", "BHSD", "BHND")


def is_opaque_attention(node: fx.Node) -> bool:
    """Whether ``node`` is an operator of some library that takes q, k and v by these names."""
    if not is_library_operator(node):
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
    layout, refused = _opaque_layout(node, q)
    unknown = _not_understood(node, (q, k, v))
    mask, scale = _named(node, _MASK), _named(node, _SCALE)
    return AttentionCall(
        q,
        k,
        v,
        result,
        layout,
        mask=mask if isinstance(mask, fx.Node) else None,
        scale=scale if isinstance(scale, (int, float)) else None,
        refused=refused or unknown or _opaque_refusal(node),
        refused_halves=unknown,
    )


def _not_understood(node: fx.Node, known: tuple[fx.Node, ...]) -> str:
    """The tensor arguments beside queries, keys, values and mask: what they ask for is not known."""
    schema = node.target._schema  # type: ignore[union-attr]
    named = {argument.name: arg(node, argument.name) for argument in schema.arguments}
    found = [
        name
        for name, value in named.items()
        if name.lower() not in _MASK and any(n not in known and tensor_of(n) is not None for n in _nodes(value))
    ]
    return f"it takes {', '.join(found)}, and what that asks for is not known" if found else ""


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def _opaque_refusal(node: fx.Node) -> str:
    """What an operator was asked to do beyond plain attention."""
    names = ("window_size_left", "window_size_right", "window_left", "window_right", "window_size", "window")
    given = [_named(node, (name,)) for name in names]
    sides = [side for value in given for side in (value if isinstance(value, (list, tuple)) else (value,))]
    softcap = _named(node, ("softcap", "logits_soft_cap", "logit_softcapping"))
    reasons = {
        "it is causal": bool(_named(node, _CAUSAL)),
        "it has dropout": bool(_named(node, _DROPOUT)),
        "it has a window of its own": any(side not in (None, -1) for side in sides),
        "it changes the scores in a way of its own": _named(node, ("alibi_slopes",)) is not None or bool(softcap),
        "its mask is no tensor": not isinstance(_named(node, _MASK), fx.Node | None),
        "its scale is no constant": not isinstance(_named(node, _SCALE), int | float | None),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _named(node: fx.Node, names: Iterable[str]) -> Any:
    """The argument of an operator that has one of ``names``; None without."""
    schema = node.target._schema  # type: ignore[union-attr]
    known = {argument.name.lower(): argument.name for argument in schema.arguments}
    return next((arg(node, known[name]) for name in names if name in known), None)


def _opaque_layout(node: fx.Node, q: fx.Node) -> tuple[Layout, str]:
    """Which axis has the tokens, and why that is not known where it is not."""
    axes, namespace = len(shape_of(q)), str(node.target.namespace)  # type: ignore[union-attr]
    library = namespace.startswith(_LIBRARIES)
    if axes == 4:
        return _four_axes(node, q, library=library)
    if axes == 3 and (not library or namespace.startswith("xformers")):
        return "BND", ""
    return "BND", f"its queries have {axes} axes" + (", with all samples in one row" if axes == 3 else "")


def _four_axes(node: fx.Node, q: fx.Node, *, library: bool) -> tuple[Layout, str]:
    said = str(_named(node, ("tensor_layout", "layout", "qkv_format")) or "").upper()
    if said in _TOKENS_FIRST or (library and not said):
        return "BNHD", ""
    if said in _HEADS_FIRST:
        return "BHND", ""
    followed = None if said else head_axis(q)
    if followed is None:
        return "BHND", f"which of its axes has the tokens is not known{f': its layout is {said}' if said else ''}"
    return ("BHND" if followed == 1 else "BNHD"), ""
