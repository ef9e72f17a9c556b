"""From an attention up to its projections and down to its output, by data flow.

A projection is a product with a parameter.  Climbing from the queries stops at the first one; what it reads is a
source.  Descending from the result passes at most one, and ends before the first operation whose other operand
depends on anything but parameters: a gate made from the timestep is never inside a region.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from difa_fx.passes.batch_step import LostBatchError
from difa_fx.passes.graph_tools import block_of, is_library_operator, module_path, shape_of, tensor_of, within
from difa_fx.passes.token_axis import Known

aten = torch.ops.aten

_PROJECTIONS = {
    aten.linear.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.mm.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten.conv1d.default: (0, 1),
    aten.conv2d.default: (0, 1),
    aten.conv3d.default: (0, 1),
    aten.conv1d.padding: (0, 1),
    aten.conv2d.padding: (0, 1),
    aten.conv3d.padding: (0, 1),
}
"""Operation to the positions of its data and its weight."""

_WEIGHT_OUT_FIRST = set(_PROJECTIONS) - {aten.addmm.default, aten.mm.default, aten.matmul.default}

_CARRIERS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.contiguous.default,
    aten.clone.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.dropout.default,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
}
"""Operations that only move or cast what they read."""

_SUMS = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor}

_LONGEST_FORK = 16
"""Operations between a fork and where it joins again."""

_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}


@dataclass(slots=True)
class Search:
    """What the walk over one graph knows.

    Attributes:
        stream: what depends on the latents.
        changing: what depends on any input of the denoiser.
        from_parameters: what depends on none.
        axes: the batch axis of what is followed from the latents.
        lost: where the trail of the batch ends.
        batch: B.
        tokens: which tokens are text.
        order: position of each node.
        modules: for each parameter the path of the module that it belongs to.
        doubled: whether the batch begins where the denoiser doubles its latents, to make guidance itself.
    """

    stream: set[fx.Node]
    changing: set[fx.Node]
    from_parameters: set[fx.Node]
    axes: dict[fx.Node, int]
    lost: dict[fx.Node, LostBatchError]
    batch: int | None
    tokens: Known
    order: dict[fx.Node, int]
    modules: dict[fx.Node, str]
    doubled: bool

    def sorted(self, nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
        """``nodes`` in graph order, without repeats."""
        return tuple(sorted(set(nodes), key=self.order.__getitem__))


def climb(start: fx.Node, search: Search) -> tuple[fx.Node, ...]:
    """The projections that ``start`` is computed from, not looking beyond them."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [start]
    while stack:
        node = stack.pop()
        if node in seen or node not in search.changing:
            continue
        seen.add(node)
        if not is_projection(node, search):
            stack.extend(node.all_input_nodes)
        elif node in search.stream or _has_tokens(node):
            found.add(node)
    return search.sorted(found)


def _has_tokens(node: fx.Node) -> bool:
    """Whether a tensor holds more than one vector a sample, as text does and an embedding of the timestep does not."""
    shape = shape_of(node)
    return len(shape) >= 3 and shape[-2] > 1


def is_projection(node: fx.Node, search: Search) -> bool:
    """Whether ``node`` multiplies data by a parameter."""
    positions = _PROJECTIONS.get(node.target)  # type: ignore[call-overload]
    if positions is None:
        return _is_library_projection(node, search)
    weight = node.args[positions[1]]
    return isinstance(weight, fx.Node) and weight in search.from_parameters


def _is_library_projection(node: fx.Node, search: Search) -> bool:
    """Whether an operator of a library takes one activation and a matrix of parameters, and keeps all axes but one.

    So do linears of quantized weights.
    """
    if not is_library_operator(node) or tensor_of(node) is None:
        return False
    data = [source for source in node.all_input_nodes if source in search.changing]
    matrices = [n for n in node.all_input_nodes if n in search.from_parameters and len(_sizes(n)) >= 2]
    return len(data) == 1 and bool(matrices) and _sizes(data[0])[:-1] == _sizes(node)[:-1] != ()


def _sizes(node: fx.Node) -> tuple[int, ...]:
    return () if tensor_of(node) is None else shape_of(node)


def data_of(projection: fx.Node, search: Search) -> fx.Node:
    """What a projection reads."""
    if projection.target not in _PROJECTIONS:
        return next(source for source in projection.all_input_nodes if source in search.changing)
    source = projection.args[_PROJECTIONS[projection.target][0]]
    assert isinstance(source, fx.Node)
    return source


def projection_flops(node: fx.Node) -> int:
    """Operations of a projection; 0 for any other node."""
    if node.target not in _PROJECTIONS:
        return 0
    data, weight = (node.args[i] for i in _PROJECTIONS[node.target])
    assert isinstance(data, fx.Node) and isinstance(weight, fx.Node)
    inner = shape_of(weight)[1:] if node.target in _WEIGHT_OUT_FIRST else shape_of(data)[-1:]
    return 2 * math.prod(shape_of(node)) * math.prod(inner)


def origin(source: fx.Node, sources: Collection[fx.Node], path: str, search: Search) -> fx.Node:
    """The one of ``sources`` that ``source`` is made from, or itself.

    A low-rank adapter projects twice, so that its first product looks like a source beside the tensor it reads.
    """
    for node in itertools.islice(_chain(source, path, search), 1, None):
        if node in sources:
            return origin(node, sources, path, search)
    return source


def meeting(one: Collection[fx.Node], other: Collection[fx.Node], path: str, search: Search) -> fx.Node | None:
    """The tensor that two sets of sources are both made from, within the block of ``path``; None without one.

    Queries and keys may be projected from two norms of one tensor, or keys from what a strided convolution made of
    it; then the region begins at that tensor.
    """
    chains = [list(_chain(source, path, search)) for source in (*one, *other)]
    common = set(chains[0]).intersection(*chains[1:])
    return next((node for node in chains[0] if node in common), None)


def _chain(source: fx.Node, path: str, search: Search) -> Iterator[fx.Node]:
    """``source`` and what it is made from, as long as that is one tensor of the latents' stream."""
    block = block_of(path)
    yield source
    while source.op == "call_function" and within(module_path(source), block):
        above = [node for node in source.all_input_nodes if node in search.stream]
        if len(above) != 1:
            return
        (source,) = above
        if tensor_of(source) is not None:
            yield source


def descend(result: fx.Node, search: Search) -> tuple[fx.Node, ...]:
    """The ends of the region below ``result``: one, or one for each part of a sequence that is split."""
    ends: list[fx.Node] = []
    stack = [(result, result, False)]
    while stack:
        node, last, projected = stack.pop()
        following = _below(node, projected, search)
        if not following:
            ends.append(node if tensor_of(node) is not None else last)
        for user, now_projected in following:
            stack.append((user, user if tensor_of(user) is not None else last, now_projected))
    return search.sorted(ends)


def _below(node: fx.Node, projected: bool, search: Search) -> list[tuple[fx.Node, bool]]:
    """What the region goes on with below ``node``, and whether it has passed its output projection then."""
    users = list(node.users)
    if len(users) == 1 and users[0].op == "call_function":
        (user,) = users
        if is_projection(user, search) and data_of(user, search) is node:
            return [] if projected else [(user, True)]
        if user.target in _SPLITS:
            return [(user, projected)]
        moves = _only_moves_or_scales(user, node, search) and tensor_of(user) is not None
        return [(user, projected)] if moves else []
    if users and all(_selects(user) for user in users):
        return [(user, projected) for user in users]
    joined = None if projected or len(users) < 2 else _rejoined(node, search)
    return [] if joined is None else [(joined, True)]


def _rejoined(start: fx.Node, search: Search) -> fx.Node | None:
    """Where what is projected from ``start`` in several ways - a layer and its low-rank adapter - is one sum again."""
    inner = {start}
    for _ in range(_LONGEST_FORK):
        outside = {user for node in inner for user in node.users if user not in inner}
        if not outside:
            return None
        user = min(outside, key=search.order.__getitem__)
        others = [source for source in user.all_input_nodes if source not in inner]
        linear = is_projection(user, search) or user.target in _CARRIERS or user.target in _SUMS
        if not linear or any(source not in search.from_parameters for source in others):
            return None
        inner.add(user)
        if all(node is user or inner.issuperset(node.users) for node in inner):
            return user
    return None


def _selects(node: fx.Node) -> bool:
    return node.target in (aten.slice.Tensor, operator.getitem, aten.narrow.default) or node.target in _SPLITS


def _only_moves_or_scales(user: fx.Node, node: fx.Node, search: Search) -> bool:
    others = [source for source in user.all_input_nodes if source is not node]
    if user.target in _CARRIERS or user.target is operator.getitem:
        return not others
    return user.target in _SUMS and all(source in search.from_parameters for source in others)
