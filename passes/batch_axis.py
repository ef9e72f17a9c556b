"""Which axis of each tensor is the batch, followed through the graph operation by operation.

A CFG half is the first or second half of the batch.  The batch need not be axis 0: it may be folded with
frames or heads (``(B T) S D``), or sit behind an unbound qkv axis.  It is always the *outermost* factor of
one axis, so that a half of the batch is a contiguous half of that axis; :func:`follow` keeps this true or
gives up with a reason.

A tensor that is not followed (a table, a shift made from the timestep, a mask) and meets a followed one
along its batch axis at full size must be halved with it: the operation reads the same index of both.  That
is a fact of broadcasting and needs no guess about which tensors "have a batch"; a table whose first size
happens to equal the batch is left alone, because it meets the batch along another axis.

Letters: B batch, T frames, S tokens, D width, H heads.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import fx

from difa_fx.passes import batch_compute, batch_shapes
from difa_fx.passes.batch_step import Axes, LostBatchError, Step
from difa_fx.passes.graph_tools import is_library_operator, takes_dtype_alone
from difa_fx.passes.opaque_attention import is_opaque_attention

_ROW_BY_ROW: Final = frozenset({"bitsandbytes"})
"""Libraries whose operators of one activation are linears: each row of it on its own."""

_RULES: Final = {**batch_shapes.RULES, **batch_compute.RULES}


def follow(node: fx.Node, axes: Axes) -> Step | None:
    """How ``node`` carries the batch, given the batch axes of its inputs; None when none has one.

    Raises:
        LostBatchError: no rule covers the operation, or the operation mixes samples of the batch.
    """
    if not any(source in axes and not takes_dtype_alone(node, source) for source in node.all_input_nodes):
        return None
    rule = _RULES.get(node.target)
    if rule is None:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
            rule = batch_compute.broadcast
        elif is_opaque_attention(node):
            rule = batch_compute.opaque_attention
        elif is_library_operator(node) and target.namespace in _ROW_BY_ROW:  # type: ignore[union-attr]
            rule = batch_compute.row_by_row
        else:
            raise LostBatchError(node, "no rule says how this operation carries the batch")
    return rule(node, axes)


def batch_axes(graph: fx.Graph, seeds: Axes) -> tuple[dict[fx.Node, int], dict[fx.Node, LostBatchError]]:
    """The batch axis of every node that can be followed from ``seeds``, and where the trail ends."""
    axes = dict(seeds)
    lost: dict[fx.Node, LostBatchError] = {}
    for node in graph.nodes:
        if node.op != "call_function" or any(source in lost for source in node.all_input_nodes):
            continue
        try:
            step = follow(node, axes)
        except LostBatchError as error:
            lost[node] = error
            continue
        if step is not None:
            axes[node] = step.axis
    return axes, lost
