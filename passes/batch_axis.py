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

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from difa_fx.passes.graph_tools import arg, axis_order, shape_of, takes_dtype_alone, tensor_inputs, tensor_of
from difa_fx.passes.opaque_attention import is_opaque_attention

aten = torch.ops.aten


class LostBatchError(Exception):
    """The batch cannot be followed through a node; ``str()`` says why."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        self.node, self.reason = node, reason
        super().__init__(f"{node.name} ({node.target}): {reason}")


@dataclass(frozen=True, slots=True)
class Step:
    """How one node carries the batch.

    Attributes:
        axis: the batch axis of what the node yields (of each tensor, for a tuple).
        aligned: inputs that were not followed and must be halved, and along which axis.
        sizes: argument name to the literal sizes it needs when the batch is halved.
    """

    axis: int
    aligned: Mapping[fx.Node, int] = field(default_factory=dict)
    sizes: Mapping[str, Sequence[int] | int] = field(default_factory=dict)


Axes = Mapping[fx.Node, int]
Rule = Callable[[fx.Node, Axes], Step]
_RULES: dict[Any, Rule] = {}


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
            rule = _broadcast
        elif is_opaque_attention(node):
            rule = _opaque_attention
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


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(targets, rule))
        return rule

    return register


def _lead(node: fx.Node, axes: Axes) -> tuple[fx.Node, int]:
    """The first input that is followed, and its axis."""
    source = next(s for s in node.all_input_nodes if s in axes)
    return source, axes[source]


def _only_lead(node: fx.Node, axes: Axes) -> tuple[fx.Node, int]:
    """The first argument, when it alone is followed."""
    followed = [s for s in tensor_inputs(node) if s in axes]
    first = node.args[0]
    if followed != [first] or not isinstance(first, fx.Node):
        raise LostBatchError(node, "an input other than the first has the batch")
    return first, axes[first]


def _positive(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim


def _align(node: fx.Node, sources: Sequence[fx.Node], axes: Axes, from_right: int, size: int) -> dict[fx.Node, int]:
    """Which of ``sources``, broadcast together, must be halved at ``from_right`` (1 = last axis)."""
    aligned: dict[fx.Node, int] = {}
    for source in sources:
        if tensor_of(source) is None:
            continue
        shape = shape_of(source)
        own = len(shape) - from_right
        if source in axes:
            if axes[source] != own:
                raise LostBatchError(node, f"{source.name} has the batch at another axis")
        elif own >= 0 and shape[own] != 1:
            if shape[own] != size:
                raise LostBatchError(node, f"{source.name} does not broadcast along the batch")
            aligned[source] = own
    return aligned


@_rule(
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
    aten.expand_as.default,
    aten.lerp.Tensor,
)
def _broadcast(node: fx.Node, axes: Axes) -> Step:
    lead, axis = _lead(node, axes)
    size = shape_of(lead)[axis]
    from_right = len(shape_of(lead)) - axis
    out_axis = len(shape_of(node)) - from_right
    if size == 1 and shape_of(node)[out_axis] != 1:
        raise LostBatchError(node, "a batch of one is broadcast against a larger one")
    return Step(out_axis, _align(node, tensor_inputs(node), axes, from_right, size))


@_rule(
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
    source, axis = _only_lead(node, axes)
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


@_rule(aten.expand.default)
def _expand(node: fx.Node, axes: Axes) -> Step:
    source, axis = _only_lead(node, axes)
    shape = shape_of(node)
    out_axis = axis + len(shape) - len(shape_of(source))
    half = [*shape]
    half[out_axis] //= 2
    return Step(out_axis, sizes={"size": half})


@_rule(aten.repeat.default)
def _repeat(node: fx.Node, axes: Axes) -> Step:
    source, axis = _only_lead(node, axes)
    repeats = list(arg(node, "repeats"))
    out_axis = axis + len(repeats) - len(shape_of(source))
    if repeats[out_axis] != 1:
        raise LostBatchError(node, "the batch itself is repeated")
    return Step(out_axis)


@_rule(aten.repeat_interleave.self_int)
def _repeat_interleave(node: fx.Node, axes: Axes) -> Step:
    source, axis = _only_lead(node, axes)
    dim = arg(node, "dim")
    if dim is None:
        raise LostBatchError(node, "the tensor is flattened")
    if _positive(dim, len(shape_of(source))) != axis:
        return Step(axis)
    return Step(axis, sizes={"output_size": shape_of(node)[axis] // 2})


@_rule(aten.permute.default, aten.transpose.int, aten.t.default, aten.swapaxes.default)
def _permute(node: fx.Node, axes: Axes) -> Step:
    _, axis = _only_lead(node, axes)
    return Step(axis_order(node).index(axis))


@_rule(aten.movedim.int)
def _movedim(node: fx.Node, axes: Axes) -> Step:
    source, axis = _only_lead(node, axes)
    ndim = len(shape_of(source))
    order = [d for d in range(ndim) if d != _positive(arg(node, "source"), ndim)]
    order.insert(_positive(arg(node, "destination"), ndim), _positive(arg(node, "source"), ndim))
    return Step(order.index(axis))


@_rule(
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
    source, axis = _only_lead(node, axes)
    dims = arg(node, "dims") if node.target in (aten.flip.default, aten.roll.default) else [arg(node, "dim")]
    touched = {_positive(d, len(shape_of(source))) for d in dims}
    if node.target is aten.slice.Tensor and shape_of(node) == shape_of(source):
        return Step(axis)
    if axis in touched:
        raise LostBatchError(node, "it works along the batch")
    return Step(axis)


@_rule(aten.unbind.int, aten.select.int)
def _drop_dim(node: fx.Node, axes: Axes) -> Step:
    source, axis = _only_lead(node, axes)
    dim = _positive(arg(node, "dim"), len(shape_of(source)))
    if dim == axis:
        raise LostBatchError(node, "it takes single samples out of the batch")
    return Step(axis - (dim < axis))


@_rule(aten.cat.default, aten.stack.default)
def _cat(node: fx.Node, axes: Axes) -> Step:
    lead, axis = _lead(node, axes)
    ndim = len(shape_of(lead))
    stacked = node.target is aten.stack.default
    dim = _positive(arg(node, "dim"), ndim + stacked)
    if not stacked and dim == axis:
        raise LostBatchError(node, "it concatenates along the batch")
    aligned = _align(node, tensor_inputs(node), axes, ndim - axis, shape_of(lead)[axis])
    return Step(axis + (stacked and dim <= axis), aligned)


@_rule(aten.slice_scatter.default, aten.select_scatter.default)
def _scatter(node: fx.Node, axes: Axes) -> Step:
    """A functionalised ``setitem``: base[..., part] = source."""
    base, source = node.args[0], node.args[1]
    assert isinstance(base, fx.Node) and isinstance(source, fx.Node)
    selects = node.target is aten.select_scatter.default
    ndim = len(shape_of(base))
    dim = _positive(arg(node, "dim"), ndim)
    axis = axes[base] if base in axes else axes[source] + (selects and dim <= axes[source])
    whole = not selects and shape_of(base) == shape_of(source)
    if dim == axis and not whole:
        raise LostBatchError(node, "it writes to part of the batch")
    expected = {base: axis, source: axis - (selects and dim < axis)}
    wrong = [n.name for n, a in expected.items() if axes.get(n, a) != a]
    if wrong:
        raise LostBatchError(node, f"{wrong[0]} has the batch at another axis")
    return Step(axis, {n: a for n, a in expected.items() if n not in axes})


@_rule(aten.type_as.default)
def _cast(node: fx.Node, axes: Axes) -> Step:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return Step(axes[source])


@_rule(aten.linear.default)
def _linear(node: fx.Node, axes: Axes) -> Step:
    source, axis = _only_lead(node, axes)
    if axis == len(shape_of(source)) - 1:
        raise LostBatchError(node, "it mixes along the batch")
    return Step(axis)


@_rule(aten.addmm.default)
def _addmm(node: fx.Node, axes: Axes) -> Step:
    bias, left = node.args[0], node.args[1]
    assert isinstance(bias, fx.Node) and isinstance(left, fx.Node)
    if [s for s in tensor_inputs(node) if s in axes] != [left] or axes[left] != 0:
        raise LostBatchError(node, "it mixes along the batch")
    return Step(0, _align(node, [bias], axes, 2, shape_of(left)[0]))


@_rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def _matmul(node: fx.Node, axes: Axes) -> Step:
    left, right = node.args[0], node.args[1]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    lead, axis = _lead(node, axes)
    from_right = len(shape_of(lead)) - axis
    out_axis = len(shape_of(node)) - from_right
    if from_right > 2 and len(shape_of(node)) == max(len(shape_of(left)), len(shape_of(right))):
        return Step(out_axis, _align(node, [left, right], axes, from_right, shape_of(lead)[axis]))
    if lead is left and right not in axes and from_right == 2:
        return Step(out_axis)
    raise LostBatchError(node, "it mixes along the batch")


@_rule(aten.baddbmm.default)
def _baddbmm(node: fx.Node, axes: Axes) -> Step:
    lead, axis = _lead(node, axes)
    if axis != 0 or len(shape_of(lead)) != 3:
        raise LostBatchError(node, "it mixes along the batch")
    return Step(0, _align(node, tensor_inputs(node), axes, 3, shape_of(lead)[0]))


@_rule(aten.scaled_dot_product_attention.default)
def _attention(node: fx.Node, axes: Axes) -> Step:
    lead, axis = _lead(node, axes)
    from_right = len(shape_of(lead)) - axis
    if from_right <= 2:
        raise LostBatchError(node, "it mixes along the batch")
    return Step(axis, _align(node, tensor_inputs(node), axes, from_right, shape_of(lead)[axis]))


def _opaque_attention(node: fx.Node, axes: Axes) -> Step:
    """Whatever the order of its other axes, the batch is outermost in [B, N, H, D] and [B, H, N, D]."""
    lead, axis = _lead(node, axes)
    if axis != 0 or len(shape_of(lead)) != 4:
        raise LostBatchError(node, "the batch is not at axis 0 of [B, N, H, D]")
    sources = [n for n in tensor_inputs(node) if len(shape_of(n)) == 4]
    return Step(0, _align(node, sources, axes, 4, shape_of(lead)[0]))


@_rule(aten.layer_norm.default, aten.rms_norm.default)
def _norm(node: fx.Node, axes: Axes) -> Step:
    source, axis = _only_lead(node, axes)
    if axis >= len(shape_of(source)) - len(arg(node, "normalized_shape")):
        raise LostBatchError(node, "it normalises along the batch")
    return Step(axis)


@_rule(
    aten.group_norm.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv2d.padding,
    aten.conv1d.padding,
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
    _, axis = _only_lead(node, axes)
    if axis != 0:
        raise LostBatchError(node, "the batch is not at axis 0")
    return Step(0)


@_rule(
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.var.correction,
    aten.amax.default,
    aten.amin.default,
    aten.linalg_vector_norm.default,
)
def _reduce(node: fx.Node, axes: Axes) -> Step:
    source, axis = _only_lead(node, axes)
    ndim = len(shape_of(source))
    dims = arg(node, "dim")
    if not dims:
        raise LostBatchError(node, "it reduces over the batch")
    reduced = {_positive(d, ndim) for d in ([dims] if isinstance(dims, int) else dims)}
    if axis in reduced:
        raise LostBatchError(node, "it reduces over the batch")
    return Step(axis if arg(node, "keepdim") else axis - sum(d < axis for d in reduced))


@_rule(aten.constant_pad_nd.default, aten.pad.default)
def _pad(node: fx.Node, axes: Axes) -> Step:
    source, axis = _only_lead(node, axes)
    padded = len(arg(node, "pad")) // 2
    if axis >= len(shape_of(source)) - padded and shape_of(node)[axis] != shape_of(source)[axis]:
        raise LostBatchError(node, "it pads the batch")
    return Step(axis)


@_rule(aten.embedding.default)
def _embedding(node: fx.Node, axes: Axes) -> Step:
    table, index = node.args[0], node.args[1]
    assert isinstance(table, fx.Node) and isinstance(index, fx.Node)
    if table in axes:
        raise LostBatchError(node, "its table has the batch")
    return Step(axes[index])


@_rule(aten.view_as_complex.default, aten.view_as_real.default)
def _complex(node: fx.Node, axes: Axes) -> Step:
    return Step(_only_lead(node, axes)[1])


@_rule(operator.getitem)
def _getitem(node: fx.Node, axes: Axes) -> Step:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return Step(axes[source])
