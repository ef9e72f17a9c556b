"""Rules of operations that move, pick or repeat what is there; see :mod:`difa_fx.passes.batch_axis`."""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from difa_fx.passes.batch_step import Axes, LostBatchError, Rules, Step, align, leading, only_leading, positive
from difa_fx.passes.graph_tools import arg, axis_order, shape_of, tensor_inputs

aten = torch.ops.aten

RULES = Rules()


@RULES.of(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
def _same_order(node: fx.Node, axes: Axes) -> Step:
    """Operations that keep the elements' flat order: the half is the same run of elements.

    With P the product of the sizes before the batch axis, the half is the first half of each of P runs.  In
    the new shape it is again a half of one axis if some axis has P before it and an even size.
    """
    source, axis = only_leading(node, axes)
    before, after = shape_of(source), shape_of(node)
    prefix = math.prod(before[:axis])
    for out_axis, size in enumerate(after):
        if size > 1 and math.prod(after[:out_axis]) == prefix:
            if size % 2 and before[axis] % 2 == 0:
                raise LostBatchError(node, f"axis {out_axis} of size {size} cannot be halved")
            half = [*after]
            half[out_axis] //= 2
            return Step(out_axis, sizes={"size": half})
    raise LostBatchError(node, f"the batch axis {axis} of {before} is merged with an outer axis in {after}")


@RULES.of(aten.expand.default)
def _expand(node: fx.Node, axes: Axes) -> Step:
    source, axis = only_leading(node, axes)
    shape = shape_of(node)
    out_axis = axis + len(shape) - len(shape_of(source))
    half = [*shape]
    half[out_axis] //= 2
    return Step(out_axis, sizes={"size": half})


@RULES.of(aten.repeat.default)
def _repeat(node: fx.Node, axes: Axes) -> Step:
    source, axis = only_leading(node, axes)
    repeats = list(arg(node, "repeats"))
    out_axis = axis + len(repeats) - len(shape_of(source))
    if repeats[out_axis] != 1:
        raise LostBatchError(node, "the batch itself is repeated")
    return Step(out_axis)


@RULES.of(aten.repeat_interleave.self_int)
def _repeat_interleave(node: fx.Node, axes: Axes) -> Step:
    source, axis = only_leading(node, axes)
    dim = arg(node, "dim")
    if dim is None:
        raise LostBatchError(node, "the tensor is flattened")
    if positive(dim, len(shape_of(source))) != axis:
        return Step(axis)
    return Step(axis, sizes={"output_size": shape_of(node)[axis] // 2})


@RULES.of(aten.permute.default, aten.transpose.int, aten.t.default, aten.swapaxes.default)
def _permute(node: fx.Node, axes: Axes) -> Step:
    _, axis = only_leading(node, axes)
    return Step(axis_order(node).index(axis))


@RULES.of(aten.movedim.int)
def _movedim(node: fx.Node, axes: Axes) -> Step:
    source, axis = only_leading(node, axes)
    ndim = len(shape_of(source))
    order = [d for d in range(ndim) if d != positive(arg(node, "source"), ndim)]
    order.insert(positive(arg(node, "destination"), ndim), positive(arg(node, "source"), ndim))
    return Step(order.index(axis))


@RULES.of(
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.slice.Tensor,
    aten.softmax.int,
    aten._softmax.default,
    aten.cumsum.default,
    aten.flip.default,
    aten.roll.default,
    aten.narrow.default,
    aten.index_select.default,
    aten.sort.default,
    aten.tensor_split.sections,
)
def _along_another_dim(node: fx.Node, axes: Axes) -> Step:
    source, axis = only_leading(node, axes)
    dims = arg(node, "dims") if node.target in (aten.flip.default, aten.roll.default) else [arg(node, "dim")]
    touched = {positive(d, len(shape_of(source))) for d in dims}
    if node.target is aten.slice.Tensor and shape_of(node) == shape_of(source):
        return Step(axis)
    if axis in touched:
        raise LostBatchError(node, "it works along the batch")
    return Step(axis)


@RULES.of(aten.unbind.int, aten.select.int)
def _drop_dim(node: fx.Node, axes: Axes) -> Step:
    source, axis = only_leading(node, axes)
    dim = positive(arg(node, "dim"), len(shape_of(source)))
    if dim == axis:
        raise LostBatchError(node, "it takes single samples out of the batch")
    return Step(axis - (dim < axis))


@RULES.of(aten.cat.default, aten.stack.default)
def _cat(node: fx.Node, axes: Axes) -> Step:
    lead, axis = leading(node, axes)
    ndim = len(shape_of(lead))
    stacked = node.target is aten.stack.default
    dim = positive(arg(node, "dim"), ndim + stacked)
    if not stacked and dim == axis:
        raise LostBatchError(node, "it concatenates along the batch")
    aligned = align(node, tensor_inputs(node), axes, ndim - axis, shape_of(lead)[axis])
    return Step(axis + (stacked and dim <= axis), aligned)


@RULES.of(aten.slice_scatter.default, aten.select_scatter.default)
def _scatter(node: fx.Node, axes: Axes) -> Step:
    """A functionalised ``setitem``: base[..., part] = source."""
    base, source = node.args[0], node.args[1]
    assert isinstance(base, fx.Node) and isinstance(source, fx.Node)
    selects = node.target is aten.select_scatter.default
    ndim = len(shape_of(base))
    dim = positive(arg(node, "dim"), ndim)
    axis = axes[base] if base in axes else axes[source] + (selects and dim <= axes[source])
    whole = not selects and shape_of(base) == shape_of(source)
    if dim == axis and not whole:
        raise LostBatchError(node, "it writes to part of the batch")
    expected = {base: axis, source: axis - (selects and dim < axis)}
    wrong = [n.name for n, a in expected.items() if axes.get(n, a) != a]
    if wrong:
        raise LostBatchError(node, f"{wrong[0]} has the batch at another axis")
    return Step(axis, {n: a for n, a in expected.items() if n not in axes})


@RULES.of(aten.constant_pad_nd.default, aten.pad.default)
def _pad(node: fx.Node, axes: Axes) -> Step:
    source, axis = only_leading(node, axes)
    padded = len(arg(node, "pad")) // 2
    if axis >= len(shape_of(source)) - padded and shape_of(node)[axis] != shape_of(source)[axis]:
        raise LostBatchError(node, "it pads the batch")
    return Step(axis)


@RULES.of(aten.embedding.default)
def _embedding(node: fx.Node, axes: Axes) -> Step:
    table, index = node.args[0], node.args[1]
    assert isinstance(table, fx.Node) and isinstance(index, fx.Node)
    if table in axes:
        raise LostBatchError(node, "its table has the batch")
    return Step(axes[index])


@RULES.of(aten.view_as_complex.default, aten.view_as_real.default)
def _complex(node: fx.Node, axes: Axes) -> Step:
    return Step(only_leading(node, axes)[1])


@RULES.of(operator.getitem)
def _getitem(node: fx.Node, axes: Axes) -> Step:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return Step(axes[source])
