"""Which tokens of a joint sequence are text, read from the graph's own concatenation.

A joint attention sees one sequence of text and image tokens.  Some denoisers concatenate queries, keys and values
after their projections, others the streams before, with the text in front or behind.  What is concatenated first
tells them apart: a part that does not depend on the latents is text (or another condition), one that does is
image.  From there the two are followed, operation by operation, through splits and sums of later layers::

    text_BLD (no latents) --.
                             cat -> [text L | image N] -> ... -> attention -> split -> text L, image N
    image_BND (latents) ----'

Only a concatenation tells; a tensor that no concatenation led to is not followed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from difa_fx.passes.graph_tools import arg, axis_order, shape_of, tensor_of

aten = torch.ops.aten

Part = tuple[Literal["text", "image"], int]
"""A run of tokens: what they are, and how many."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The runs of tokens along one axis of a tensor."""

    axis: int
    parts: tuple[Part, ...]

    @property
    def count(self) -> int:
        """How many tokens there are."""
        return sum(size for _, size in self.parts)

    @property
    def is_joint(self) -> bool:
        """Whether text and image are both among them."""
        return len({kind for kind, _ in self.parts}) == 2

    @property
    def text(self) -> tuple[int, int] | None:
        """How many text tokens stand before and after the image's; None when the image is in several runs."""
        kinds = [kind for kind, _ in self.parts]
        if kinds.count("image") != 1:
            return None
        at = kinds.index("image")
        return sum(size for _, size in self.parts[:at]), sum(size for _, size in self.parts[at + 1 :])

    def cut(self, start: int, stop: int) -> Tokens:
        """The runs between two tokens."""
        parts: list[Part] = []
        position = 0
        for kind, size in self.parts:
            low, high = max(start, position), min(stop, position + size)
            if low < high:
                parts.append((kind, high - low))
            position += size
        return Tokens(self.axis, tuple(parts))


Known = dict[fx.Node, Tokens]
Rule = Callable[[fx.Node, Known], "Tokens | None"]


def token_runs(
    graph: fx.Graph,
    stream: Set[fx.Node],
    queries: Mapping[fx.Node, tuple[fx.Node, int]],
    given: Mapping[fx.Node, Tokens] | None = None,
) -> Known:
    """The runs of tokens of every node that a concatenation leads to.

    Args:
        graph: a canonical graph.
        stream: what depends on the latents.
        queries: the result of each attention; its queries, whose tokens it has; and the axis on which it has them.
        given: what is known of inputs that another graph of the denoiser made.
    """
    known: Known = dict(given or {})
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node in queries:
            source, axis = queries[node]
            found = replace(known[source], axis=axis) if source in known else None
        elif node.target in _JOINS:
            found = _JOINS[node.target](node, known, stream)
        elif any(source in known for source in node.all_input_nodes):
            found = _followed(node, known)
        else:
            continue
        if found is not None and found.parts:
            known[node] = found
    return known


def _concatenated(node: fx.Node, known: Known, stream: Set[fx.Node]) -> Tokens | None:
    """Runs of a concatenation: along its axis the parts follow each other, along another they must agree."""
    sources = node.args[0]
    assert isinstance(sources, (list, tuple))
    ndim = len(shape_of(node))
    axis = arg(node, "dim") % ndim
    nodes = [source for source in sources if isinstance(source, fx.Node)]
    if axis == ndim - 1 or any(n in known and known[n].axis != axis for n in nodes):
        return _elementwise(node, known)
    if len(nodes) < 2:
        return None
    if not any(n in known for n in nodes) and (all(n in stream for n in nodes) or not any(n in stream for n in nodes)):
        return None
    parts: list[Part] = []
    for source in nodes:
        own = known[source].parts if source in known else ((_kind(source, stream), shape_of(source)[axis]),)
        parts += own
    return Tokens(axis, _merged(parts))


def _written(node: fx.Node, known: Known, stream: Set[fx.Node]) -> Tokens | None:
    """Runs after a write to some of the tokens; what was blank before counts as text, which no window cuts."""
    base, source = node.args[0], node.args[1]
    assert isinstance(base, fx.Node) and isinstance(source, fx.Node)
    axis = arg(node, "dim") % len(shape_of(node))
    before = known.get(base)
    if before is None and (base in stream or source not in stream):
        return None
    if before is None and axis == len(shape_of(node)) - 1:
        return known.get(source)
    before = before or Tokens(axis, (("text", shape_of(node)[axis]),))
    if before.axis != axis or arg(node, "step") not in (None, 1):
        return before
    count = shape_of(source)[axis]
    start = arg(node, "start") or 0
    start = start + before.count if start < 0 else start
    inner = known[source].parts if source in known else ((_kind(source, stream), count),)
    around = (before.cut(0, start).parts, inner, before.cut(start + count, before.count).parts)
    return Tokens(axis, _merged([part for parts in around for part in parts]))


def _inserted(node: fx.Node, known: Known, stream: Set[fx.Node]) -> Tokens | None:
    """Runs after one sample was written into a batch: samples must agree."""
    base, source = node.args[0], node.args[1]
    assert isinstance(base, fx.Node) and isinstance(source, fx.Node)
    dim = arg(node, "dim") % len(shape_of(node))
    before, new = known.get(base), known.get(source)
    if new is None:
        return before
    new = Tokens(new.axis + (dim <= new.axis), new.parts)
    return new if before in (None, new) and (before is not None or base not in stream) else None


def _kind(node: fx.Node, stream: Set[fx.Node]) -> Literal["text", "image"]:
    return "image" if node in stream else "text"


def _merged(parts: list[Part]) -> tuple[Part, ...]:
    merged: list[Part] = []
    for kind, size in parts:
        if merged and merged[-1][0] == kind:
            merged[-1] = (kind, merged[-1][1] + size)
        else:
            merged.append((kind, size))
    return tuple(merged)


def _followed(node: fx.Node, known: Known) -> Tokens | None:
    rule = _RULES.get(node.target)
    if rule is not None:
        return rule(node, known)
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return _elementwise(node, known)
    return None


def _elementwise(node: fx.Node, known: Known) -> Tokens | None:
    """Broadcast together, the inputs that are followed must say the same of the same axis."""
    if tensor_of(node) is None:
        return None
    ndim = len(shape_of(node))
    found = {
        Tokens(known[n].axis + ndim - len(shape_of(n)), known[n].parts) for n in node.all_input_nodes if n in known
    }
    if len(found) != 1:
        return None
    (tokens,) = found
    return tokens if shape_of(node)[tokens.axis] == tokens.count else None


def _lead(node: fx.Node, known: Known) -> Tokens | None:
    """The runs of the first argument."""
    source = node.args[0] if node.args else None
    return known.get(source) if isinstance(source, fx.Node) else None


def _same_axis(node: fx.Node, known: Known) -> Tokens | None:
    tokens = _lead(node, known)
    if tokens is None or tensor_of(node) is None or tokens.axis >= len(shape_of(node)):
        return None
    return tokens if shape_of(node)[tokens.axis] == tokens.count else None


def _copied(node: fx.Node, known: Known) -> Tokens | None:
    """A copy has what was copied, not what was there before."""
    source = node.args[1]
    assert isinstance(source, fx.Node)
    return known.get(source) if shape_of(source) == shape_of(node) else None


def _reshaped(node: fx.Node, known: Known) -> Tokens | None:
    """The axis that has as much before it and the same size."""
    tokens = _lead(node, known)
    if tokens is None:
        return None
    prefix = math.prod(shape_of(node.args[0])[: tokens.axis])  # type: ignore[arg-type]
    after = shape_of(node)
    for axis, size in enumerate(after):
        if size == tokens.count and math.prod(after[:axis]) == prefix:
            return Tokens(axis, tokens.parts)
    return None


def _permuted(node: fx.Node, known: Known) -> Tokens | None:
    tokens = _lead(node, known)
    if tokens is None:
        return None
    return Tokens(axis_order(node).index(tokens.axis), tokens.parts)


def _sliced(node: fx.Node, known: Known) -> Tokens | None:
    tokens = _lead(node, known)
    if tokens is None:
        return None
    if arg(node, "dim") % len(shape_of(node)) != tokens.axis:
        return tokens
    size = tokens.count
    start, stop = arg(node, "start") or 0, arg(node, "end")
    if arg(node, "step") not in (None, 1):
        return None
    start = max(start + size, 0) if start < 0 else min(start, size)
    stop = size if stop is None else (max(stop + size, 0) if stop < 0 else min(stop, size))
    return tokens.cut(start, stop)


def _split(node: fx.Node, known: Known) -> Tokens | None:
    """A split yields a list; its runs are those of the whole, and :func:`_item` cuts them."""
    return _lead(node, known)


def _item(node: fx.Node, known: Known) -> Tokens | None:
    source, index = node.args
    assert isinstance(source, fx.Node) and isinstance(index, int)
    tokens, value = known.get(source), source.meta.get("val")
    if tokens is None or not isinstance(value, (list, tuple)) or tensor_of(node) is None:
        return None
    if source.target in (aten.unbind.int,):
        return _unbound(source, tokens)
    if arg(source, "dim") % value[index].ndim != tokens.axis:
        return tokens if shape_of(node)[tokens.axis] == tokens.count else None
    start = sum(int(part.shape[tokens.axis]) for part in value[:index])
    return tokens.cut(start, start + shape_of(node)[tokens.axis])


def _unbound(source: fx.Node, tokens: Tokens) -> Tokens | None:
    ndim = len(shape_of(source.args[0]))  # type: ignore[arg-type]
    dim = arg(source, "dim") % ndim
    return None if dim == tokens.axis else Tokens(tokens.axis - (dim < tokens.axis), tokens.parts)


def _selected(node: fx.Node, known: Known) -> Tokens | None:
    tokens = _lead(node, known)
    return None if tokens is None else _unbound(node, tokens)


def _stacked(node: fx.Node, known: Known) -> Tokens | None:
    sources = node.args[0]
    assert isinstance(sources, (list, tuple))
    found = {known[s] for s in sources if isinstance(s, fx.Node) and s in known}
    if len(found) != 1:
        return None
    (tokens,) = found
    dim = arg(node, "dim") % len(shape_of(node))
    return Tokens(tokens.axis + (dim <= tokens.axis), tokens.parts)


def _padded(node: fx.Node, known: Known) -> Tokens | None:
    """Samples of equal lengths, made into a batch."""
    sources = node.args[0]
    assert isinstance(sources, (list, tuple))
    found = {known.get(s) for s in sources if isinstance(s, fx.Node)}
    tokens = found.pop() if len(found) == 1 else None
    return None if tokens is None or not arg(node, "batch_first") else Tokens(tokens.axis + 1, tokens.parts)


_JOINS: dict[Any, Callable[[fx.Node, Known, Set[fx.Node]], Tokens | None]] = {
    aten.cat.default: _concatenated,
    aten.slice_scatter.default: _written,
    aten.select_scatter.default: _inserted,
}

_RULES: dict[Any, Rule] = {
    aten.linear.default: _same_axis,
    aten.layer_norm.default: _same_axis,
    aten.rms_norm.default: _same_axis,
    aten.mean.dim: _same_axis,
    aten.type_as.default: _same_axis,
    aten.copy.default: _copied,
    aten.contiguous.default: _same_axis,
    aten.clone.default: _same_axis,
    aten._to_copy.default: _same_axis,
    aten.to.dtype: _same_axis,
    aten.dropout.default: _same_axis,
    aten.view_as_complex.default: _same_axis,
    aten.view_as_real.default: _same_axis,
    aten.scaled_dot_product_attention.default: _same_axis,
    aten.matmul.default: _same_axis,
    aten.bmm.default: _same_axis,
    aten.expand.default: _reshaped,
    aten.view.default: _reshaped,
    aten.reshape.default: _reshaped,
    aten._unsafe_view.default: _reshaped,
    aten.unsqueeze.default: _reshaped,
    aten.squeeze.dim: _reshaped,
    aten.flatten.using_ints: _reshaped,
    aten.unflatten.int: _reshaped,
    aten.transpose.int: _permuted,
    aten.permute.default: _permuted,
    aten.slice.Tensor: _sliced,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.unbind.int: _split,
    operator.getitem: _item,
    aten.select.int: _selected,
    aten.stack.default: _stacked,
    aten.pad_sequence.default: _padded,
}
