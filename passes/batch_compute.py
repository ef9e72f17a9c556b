"""Rules of operations that compute: by element, products, attention, norms; see :mod:`difa_fx.passes.batch_axis`."""

from __future__ import annotations

import torch
from torch import fx

from difa_fx.passes.batch_step import Axes, LostBatchError, Rules, Step, align, leading, only_leading, positive
from difa_fx.passes.graph_tools import arg, shape_of, tensor_inputs

aten = torch.ops.aten

RULES = Rules()


@RULES.of(
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
    aten.copy.default,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.alias.default,
    aten.masked_fill.Tensor,
    aten.masked_fill.Scalar,
    aten.where.self,
    aten.where.Scalar,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    aten.expand_as.default,
    aten.lerp.Tensor,
)
def broadcast(node: fx.Node, axes: Axes) -> Step:
    """Element by element: inputs meet along the batch, counted from the last axis."""
    lead, axis = leading(node, axes)
    size = shape_of(lead)[axis]
    from_right = len(shape_of(lead)) - axis
    out_axis = len(shape_of(node)) - from_right
    if size == 1 and shape_of(node)[out_axis] != 1:
        raise LostBatchError(node, "a batch of one is broadcast against a larger one")
    return Step(out_axis, align(node, tensor_inputs(node), axes, from_right, size))


@RULES.of(aten.type_as.default)
def _cast(node: fx.Node, axes: Axes) -> Step:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return Step(axes[source])


@RULES.of(aten.linear.default)
def _linear(node: fx.Node, axes: Axes) -> Step:
    source, axis = only_leading(node, axes)
    if axis == len(shape_of(source)) - 1:
        raise LostBatchError(node, "it mixes along the batch")
    return Step(axis)


def row_by_row(node: fx.Node, axes: Axes) -> Step:
    """A linear of a library, whose weights have no batch."""
    source, axis = only_leading(node, axes)
    if axis == len(shape_of(source)) - 1 or shape_of(node)[:-1] != shape_of(source)[:-1]:
        raise LostBatchError(node, "it mixes along the batch")
    return Step(axis)


@RULES.of(aten.addmm.default)
def _addmm(node: fx.Node, axes: Axes) -> Step:
    bias, left = node.args[0], node.args[1]
    assert isinstance(bias, fx.Node) and isinstance(left, fx.Node)
    if [s for s in tensor_inputs(node) if s in axes] != [left] or axes[left] != 0:
        raise LostBatchError(node, "it mixes along the batch")
    return Step(0, align(node, [bias], axes, 2, shape_of(left)[0]))


@RULES.of(aten.matmul.default, aten.bmm.default, aten.mm.default)
def _matmul(node: fx.Node, axes: Axes) -> Step:
    left, right = node.args[0], node.args[1]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    lead, axis = leading(node, axes)
    from_right = len(shape_of(lead)) - axis
    out_axis = len(shape_of(node)) - from_right
    if from_right > 2 and len(shape_of(node)) == max(len(shape_of(left)), len(shape_of(right))):
        return Step(out_axis, align(node, [left, right], axes, from_right, shape_of(lead)[axis]))
    if lead is left and right not in axes and from_right == 2:
        return Step(out_axis)
    raise LostBatchError(node, "it mixes along the batch")


@RULES.of(aten.baddbmm.default)
def _baddbmm(node: fx.Node, axes: Axes) -> Step:
    lead, axis = leading(node, axes)
    if axis != 0 or len(shape_of(lead)) != 3:
        raise LostBatchError(node, "it mixes along the batch")
    return Step(0, align(node, tensor_inputs(node), axes, 3, shape_of(lead)[0]))


@RULES.of(aten.scaled_dot_product_attention.default)
def _attention(node: fx.Node, axes: Axes) -> Step:
    lead, axis = leading(node, axes)
    from_right = len(shape_of(lead)) - axis
    if from_right <= 2:
        raise LostBatchError(node, "it mixes along the batch")
    return Step(axis, align(node, tensor_inputs(node), axes, from_right, shape_of(lead)[axis]))


def opaque_attention(node: fx.Node, axes: Axes) -> Step:
    """Whatever the order of its other axes, the batch is outermost in [B, N, H, D] and [B, H, N, D]."""
    lead, axis = leading(node, axes)
    if axis != 0 or len(shape_of(lead)) != 4:
        raise LostBatchError(node, "the batch is not at axis 0 of [B, N, H, D]")
    sources = [n for n in tensor_inputs(node) if len(shape_of(n)) == 4]
    return Step(0, align(node, sources, axes, 4, shape_of(lead)[0]))


@RULES.of(aten.layer_norm.default, aten.rms_norm.default)
def _norm(node: fx.Node, axes: Axes) -> Step:
    source, axis = only_leading(node, axes)
    if axis >= len(shape_of(source)) - len(arg(node, "normalized_shape")):
        raise LostBatchError(node, "it normalises along the batch")
    return Step(axis)


@RULES.of(
    aten.group_norm.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv2d.padding,
    aten.conv1d.padding,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
)
def _per_sample(node: fx.Node, axes: Axes) -> Step:
    _, axis = only_leading(node, axes)
    if axis != 0:
        raise LostBatchError(node, "the batch is not at axis 0")
    return Step(0)


@RULES.of(
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.var.correction,
    aten.amax.default,
    aten.amin.default,
    aten.linalg_vector_norm.default,
)
def _reduce(node: fx.Node, axes: Axes) -> Step:
    source, axis = only_leading(node, axes)
    ndim = len(shape_of(source))
    dims = arg(node, "dim")
    if not dims:
        raise LostBatchError(node, "it reduces over the batch")
    reduced = {positive(d, ndim) for d in ([dims] if isinstance(dims, int) else dims)}
    if axis in reduced:
        raise LostBatchError(node, "it reduces over the batch")
    return Step(axis if arg(node, "keepdim") else axis - sum(d < axis for d in reduced))
