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
from difa_fx.passes.graph_tools import arg, is_library_operator, shape_of, takes_dtype_alone
from difa_fx.passes.opaque_attention import is_opaque_attention

aten = torch.ops.aten

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


def begins_pair(node: fx.Node, batch: int) -> bool:
    """Whether a node puts a batch beside itself, or beside what was made of the same latents of a ``batch``.

    Denoisers that make guidance themselves begin its two halves so: ``cat([x, x])``, ``cat([f(x, text), f(x, null)])``,
    ``x.repeat(2, 1, 1)``, ``x.expand(2, -1, -1)``.
    """
    if node.target is aten.cat.default:
        parts = list(node.args[0])  # type: ignore[arg-type]
        count = len(parts) // 2
        if len(parts) % 2 or arg(node, "dim") % len(shape_of(node)):
            return False
        twins = len(parts) == 2 and shape_of(parts[0]) == shape_of(parts[1]) and shape_of(parts[0])[0] == batch
        return parts[:count] == parts[count:] or twins
    if node.target is aten.repeat.default:
        repeats = list(arg(node, "repeats"))
        return len(repeats) == len(shape_of(node.args[0])) and repeats[0] == 2  # type: ignore[arg-type]
    if node.target is aten.expand.default:
        before, after = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
        return len(before) == len(after) > 1 and before[0] == 1 and after[0] == 2
    return False


def batch_axes(graph: fx.Graph, seeds: Axes) -> tuple[dict[fx.Node, int], dict[fx.Node, LostBatchError]]:
    """The batch axis of every node that can be followed from ``seeds``, and where the trail ends."""
    axes = dict(seeds)
    lost: dict[fx.Node, LostBatchError] = {}
    for node in graph.nodes:
        if node in seeds or node.op != "call_function" or any(source in lost for source in node.all_input_nodes):
            continue
        try:
            step = follow(node, axes)
        except LostBatchError as error:
            lost[node] = error
            continue
        if step is not None:
            axes[node] = step.axis
    return axes, lost
