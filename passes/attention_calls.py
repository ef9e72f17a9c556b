"""The attention itself, in whatever spelling the model has it, as one kind of record.

Three spellings are read, each by what it computes and not by who wrote it::

    fused      scaled_dot_product_attention(q, k, v)                             [B, H, N, D]
    opaque     an operator of some library with arguments q, k, v                [B, N, H, D] or [B, H, N, D]
    explicit   q @ k^T -> [scale, mask, casts] -> softmax -> [casts] -> @ v      [..., N, D]

Letters: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import fx

from difa_fx.passes.attention_call import AttentionCall, Layout, UnreadCall
from difa_fx.passes.explicit_attention import SOFTMAX, explicit_attention
from difa_fx.passes.graph_tools import arg, shape_of
from difa_fx.passes.opaque_attention import is_opaque_attention, opaque_attention

__all__ = ["AttentionCall", "UnreadCall", "attention_calls"]

FUSED: Final = torch.ops.aten.scaled_dot_product_attention.default


def attention_calls(graph: fx.Graph) -> Iterator[AttentionCall | UnreadCall]:
    """Every attention of a canonical graph, in graph order."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is FUSED:
            yield _fused(node)
        elif node.target in SOFTMAX:
            found = explicit_attention(node)
            if found is not None:
                yield found
        elif is_opaque_attention(node):
            opaque = opaque_attention(node)
            if opaque is not None:
                yield opaque


def _fused(node: fx.Node) -> AttentionCall:
    q, k, v = (arg(node, name) for name in ("query", "key", "value"))
    refused = ""
    if arg(node, "is_causal"):
        refused = "it is causal"
    elif arg(node, "dropout_p"):
        refused = "it has dropout"
    layout: Layout = "BHND" if len(shape_of(q)) >= 4 else "BND"
    return AttentionCall(q, k, v, node, layout, mask=arg(node, "attn_mask"), scale=arg(node, "scale"), refused=refused)
