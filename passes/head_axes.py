"""Which axis of the queries has the heads, followed from the operation that cut them out of the width.

Letters: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch import fx

from difa_fx.passes.graph_tools import arg, shape_of, tensor_of

aten = torch.ops.aten

_VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
)

_PROJECTIONS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default)


def head_axis(queries: fx.Node) -> int | None:
    """The axis of ``queries`` [B, ?, ?, D] that a reshape cut out of the width; None where it cannot be followed.

    An axis 1 or 2 is followed upwards through transpositions, selections and whatever keeps the number of axes, to the
    reshape that made the last two factors of one axis.
    """
    heads = [axis for axis in (1, 2) if _is_cut_from_width(queries, axis)]
    return heads[0] if len(heads) == 1 else None


def _is_cut_from_width(start: fx.Node, axis: int) -> bool:
    node = start
    while node.op == "call_function" and node.all_input_nodes and node.target not in _PROJECTIONS:
        source = node.all_input_nodes[0]
        if tensor_of(source) is None and not isinstance(source.meta.get("val"), (tuple, list)):
            return False
        if node.target in _VIEWS:
            above = _above_view(shape_of(source), shape_of(node), axis)
            if above is None:
                return _splits_last(shape_of(source), shape_of(node), axis)
        else:
            above = _above(node, source, axis)
            if above is None:
                return False
        node, axis = source, above
    return False


def _above(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    """Where ``axis`` of an operation's result stands in its first input."""
    rule = _MOVES.get(node.target)
    if rule is not None:
        return rule(node, axis)
    if node.target is operator.getitem:
        return _above_part(node, source, axis)
    before = tensor_of(source)
    return axis if before is not None and before.ndim == len(shape_of(node)) else None


def _above_part(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    """Through a part of ``unbind`` (an axis less), or of ``split`` and ``chunk``."""
    if source.target is aten.unbind.int:
        dim = _positive(arg(source, "dim"), len(shape_of(node)) + 1)
        return axis + (axis >= dim)
    return axis


def _transposed(node: fx.Node, axis: int) -> int:
    count = len(shape_of(node))
    first, second = (_positive(node.args[i], count) for i in (1, 2))
    return {first: second, second: first}.get(axis, axis)


def _permuted(node: fx.Node, axis: int) -> int:
    order = node.args[1]
    assert isinstance(order, (list, tuple))
    return _positive(order[axis], len(order))


def _selected(node: fx.Node, axis: int) -> int:
    dim = _positive(node.args[1], len(shape_of(node)) + 1)
    return axis + (axis >= dim)


def _moved(node: fx.Node, axis: int) -> int | None:
    count = len(shape_of(node))
    source, target = node.args[1], node.args[2]
    sources = [_positive(d, count) for d in (source if isinstance(source, (list, tuple)) else [source])]
    targets = [_positive(d, count) for d in (target if isinstance(target, (list, tuple)) else [target])]
    if axis in targets:
        return sources[targets.index(axis)]
    rest = [d for d in range(count) if d not in sources]
    places = [d for d in range(count) if d not in targets]
    return rest[places.index(axis)]


def _parted(node: fx.Node, axis: int) -> int:
    return axis


_MOVES: dict[object, Callable[[fx.Node, int], int | None]] = {
    aten.transpose.int: _transposed,
    aten.permute.default: _permuted,
    aten.movedim.int: _moved,
    aten.movedim.intlist: _moved,
    aten.select.int: _selected,
    aten.unbind.int: _parted,
    aten.chunk.default: _parted,
    aten.split.Tensor: _parted,
    aten.split_with_sizes.default: _parted,
}


def _above_view(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    """The axis of ``before`` that a reshape keeps as ``axis``; None where it is a factor of one."""
    lead, size = math.prod(after[:axis]), after[axis]
    return next((i for i, s in enumerate(before) if math.prod(before[:i]) == lead and s == size), None)


def _splits_last(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> bool:
    """Whether a reshape cuts ``axis`` out of the last axis of ``before``."""
    rows, lead = math.prod(before[:-1]), math.prod(after[:axis])
    return len(before) > 1 and lead >= rows and lead % rows == 0


def _positive(dim: object, count: int) -> int:
    assert isinstance(dim, int)
    return dim + count if dim < 0 else dim
