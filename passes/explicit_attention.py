"""Attention spelled out: a product of queries and keys, a softmax, a product with values.

    q @ k^T -> [scale, mask, casts] -> softmax -> [casts] -> @ v      [..., N, D]
                                                  [swap]  -> v^T @    [..., D, N]

The scale may stand on either side of the first product; the mask may come as a sum, with ``baddbmm``, or overwrite
scores (``masked_fill``, ``where``); heads may be folded into the batch; and views may lie between.

Letters: N tokens, M key tokens, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx

from difa_fx.passes.attention_call import AttentionCall, Layout, UnreadCall
from difa_fx.passes.graph_tools import ancestors, arg, axis_order, descendants, shape_of, tensor_of

aten = torch.ops.aten

SOFTMAX: Final = frozenset({aten.softmax.int, aten._softmax.default})
_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default}
_CASTS = {aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.contiguous.default, aten.clone.default}
_CASTS |= {aten.dropout.default, aten.type_as.default}
_PERMUTES = {aten.permute.default, aten.transpose.int}
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default}
_CHOICES = {aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar}
_FULL = {aten.full.default, aten.full_like.default, aten.scalar_tensor.default, aten.new_full.default}
_HANDED_ON = {aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.detach.default, aten.clone.default, *_CASTS}
_MASKED: Final = -1e4
"""A score that is overwritten with less than this weighs nothing."""
_VIEWS |= {aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints, aten.unflatten.int}


@dataclass(slots=True)
class _Scores:
    """What lies between the product of queries and keys and the softmax, gathered on the way up."""

    scale: float = 1.0
    mask: fx.Node | None = None
    filled: tuple[bool, float] | None = None
    masked_shape: tuple[int, ...] = ()
    refused: str = ""

    def add_mask(self, mask: fx.Node, shape: tuple[int, ...]) -> None:
        """Another mask, which scores of ``shape`` have."""
        if self.mask is not None:
            self.refused = "it has two masks"
        elif self.scale != 1:
            self.refused = "its mask is scaled"
        self.mask, self.masked_shape = mask, shape


def explicit_attention(softmax: fx.Node) -> AttentionCall | UnreadCall | None:
    """The attention around a softmax, or None when its result weighs nothing."""
    if tensor_of(softmax) is None or arg(softmax, "dim") not in (-1, len(shape_of(softmax)) - 1):
        return None
    found = _weighing(softmax)
    if found is None:
        return None
    if isinstance(found, str):
        return UnreadCall(softmax, found)
    weighed, swapped = found
    product, scores = _product(arg(softmax, "self"))
    if product is None:
        return UnreadCall(softmax, "its scores are no product of queries and keys")
    left, right = _operands(product, scores)
    value = weighed.args[0 if swapped else 1]
    assert isinstance(value, fx.Node)
    inner = descendants([product]) & ancestors([weighed])
    if any(node is not weighed and not inner.issuperset(node.users) for node in inner):
        return UnreadCall(softmax, "its scores or weights are read elsewhere too")
    refused = scores.refused or _shape_refusal(left, right, value, weighed, swapped=swapped)
    if not refused and scores.mask is not None and len(scores.masked_shape) != len(shape_of(left)):
        refused = "its mask is added in another shape than its queries have"
    layout: Layout = "BHND" if len(shape_of(left)) >= 4 else "BND"
    return AttentionCall(
        left,
        right,
        value,
        weighed,
        layout,
        keys_transposed=True,
        values_transposed=swapped,
        mask=scores.mask,
        filled=scores.filled,
        scale=scores.scale,
        refused=refused,
    )


def linear_attention(product: fx.Node) -> tuple[fx.Node, ...] | None:
    """What a product of three activations multiplies, with casts and views between alone; None for any other node.

    Keys and values are multiplied first, so that there are no scores: linear attention.
    """
    if product.target not in _PRODUCTS or product.target is aten.baddbmm.default:
        return None
    for position in (0, 1):
        inner, other = product.args[position], product.args[1 - position]
        while isinstance(inner, fx.Node) and inner.op == "call_function" and (_carries(inner) or _divides(inner)):
            inner = inner.args[0]
        if isinstance(inner, fx.Node) and inner.target in (aten.matmul.default, aten.bmm.default):
            return tuple(n for n in (other, *inner.args) if isinstance(n, fx.Node))
    return None


def _divides(node: fx.Node) -> bool:
    return node.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(node.args[1], (int, float))


def _weighing(softmax: fx.Node) -> tuple[fx.Node, bool] | str | None:
    """The product with the values, and whether weights and values have changed places in it; or why it cannot be read.

    None where there is no such product.
    """
    node, swapped = softmax, False
    while True:
        users = list(node.users)
        products = [user for user in users if user.target in _PRODUCTS]
        if products:
            if (
                len(users) > 1
                or products[0].target is aten.baddbmm.default
                or products[0].args[0] is products[0].args[1]
            ):
                return "its weights are read elsewhere too"
            if (products[0].args[0] is node) != swapped:
                return products[0], swapped
            return "its weights stand on the wrong side of a product"
        if len(users) != 1:
            return None
        (user,) = users
        if _swaps_last(user):
            swapped = not swapped
        elif not _carries(user):
            return None
        node = user


def _product(start: Any) -> tuple[fx.Node | None, _Scores]:
    """Climb from the softmax's input to the product of queries and keys."""
    found = _Scores()
    node = start
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target not in _PRODUCTS:
        node = _above(node, found)
    return (node if isinstance(node, fx.Node) and node.target in _PRODUCTS else None), found


def _above(node: fx.Node, found: _Scores) -> fx.Node | None:
    """The scores that ``node`` is made of; what it does to them goes into ``found``."""
    target, source = node.target, node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if _carries(node):
        return source
    other = node.args[1] if len(node.args) > 1 else None
    if target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(other, (int, float)):
        found.scale *= other if target is aten.mul.Tensor else 1 / other
        return source
    if target is aten.add.Tensor and isinstance(other, fx.Node) and not node.kwargs:
        scores, mask = (source, other) if _leads_to_product(source) else (other, source)
        found.add_mask(mask, shape_of(node))
        return scores
    filled = _filled(node)
    if filled is not None:
        scores, mask, found.filled = filled
        found.add_mask(mask, shape_of(node))
        return scores
    found.refused = f"its scores pass through {target}"
    return source


def _filled(node: fx.Node) -> tuple[fx.Node, fx.Node, tuple[bool, float]] | None:
    """Scores that are overwritten under a mask; that mask; its value where they are, and with what."""
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        scores, mask, where, score = node.args[0], node.args[1], True, _number(node.args[2])
    elif node.target in _CHOICES:
        mask, one, other = node.args[:3]
        where = _number(one) is not None
        scores, score = (other, _number(one)) if where else (one, _number(other))
    else:
        return None
    if score is None or not score <= _MASKED or not isinstance(scores, fx.Node) or not isinstance(mask, fx.Node):
        return None
    return scores, mask, (where, score)


def _number(value: object) -> float | None:
    """A number, be it in a tensor that is filled with it or in a constant of the graph."""
    while isinstance(value, fx.Node) and value.target in _HANDED_ON:
        value = value.args[0]
    if isinstance(value, fx.Node) and value.target in _FULL:
        value = arg(value, "s" if value.target is aten.scalar_tensor.default else "fill_value")
    elif isinstance(value, fx.Node) and value.op == "get_attr":
        held = getattr(value.graph.owning_module, str(value.target), None)
        value = held.item() if isinstance(held, Tensor) and type(held) is Tensor and held.numel() == 1 else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _leads_to_product(node: fx.Node) -> bool:
    while node.op == "call_function" and node.target not in _PRODUCTS:
        if not _carries(node) and node.target not in (aten.mul.Tensor, aten.div.Tensor):
            return False
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return False
        node = source
    return node.op == "call_function"


def _carries(node: fx.Node) -> bool:
    """Whether a node casts what it reads or gives it another shape, with the numbers in the same order."""
    if node.target not in _PERMUTES:
        return node.target in _CASTS or node.target in _VIEWS
    moved = _moved(node)
    return moved == sorted(moved)


def _swaps_last(node: fx.Node) -> bool:
    """Whether a node swaps the last two axes, leaving aside those of size 1, and moves no other."""
    moved = _moved(node) if node.target in _PERMUTES else []
    return len(moved) >= 2 and [*moved[:-2], moved[-1], moved[-2]] == sorted(moved) and moved != sorted(moved)


def _moved(node: fx.Node) -> list[int]:
    """The axes that a permutation reads, in its order, without those of size 1."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return [axis for axis in axis_order(node) if shape_of(source)[axis] != 1]


def _operands(product: fx.Node, scores: _Scores) -> tuple[fx.Node, fx.Node]:
    """Left and right operand of the product; ``baddbmm`` brings a scale and a mask of its own."""
    if product.target is not aten.baddbmm.default:
        left, right = product.args[0], product.args[1]
        assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
        return left, right
    base, left, right = product.args[:3]
    assert isinstance(base, fx.Node) and isinstance(left, fx.Node) and isinstance(right, fx.Node)
    beta, alpha = arg(product, "beta"), arg(product, "alpha")
    if beta != 0:
        if scores.mask is not None or beta != 1 or scores.scale != 1:
            scores.refused = "its bias is scaled or comes twice"
        scores.mask, scores.masked_shape = base, shape_of(product)
    scores.scale *= alpha
    return left, right


def _shape_refusal(q: fx.Node, keys_DM: fx.Node, v: fx.Node, result: fx.Node, *, swapped: bool) -> str:
    q_shape, v_shape, out = shape_of(q), shape_of(v), shape_of(result)
    same = q_shape[:-2] == v_shape[:-2] == shape_of(keys_DM)[:-2] == out[:-2]
    if not same or len(q_shape) not in (3, 4):
        return "its queries, keys and values are not of one shape"
    if out[-1 if swapped else -2] != q_shape[-2]:
        return "its result has another shape than its queries"
    return ""
