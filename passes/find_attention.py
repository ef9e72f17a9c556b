"""find_attention: where the attention is, what kind it is, and what a plan may make of it.  No edit.

The search anchors at the attention operation itself, climbs from its query, key and value to the
projections, and descends to the output projection, all by data flow::

    source_BND -> linear -> view, transpose -> q_BHND -.
               -> linear -> ...             -> k_BHND --> attention -> transpose, view -> linear -> output_BND
               -> linear -> ...             -> v_BHND -'

The *region* is everything between source and output.  It ends before a gate or residual, that is before the
first operation whose other operand depends on anything but parameters.

Letters: B batch, H heads, N tokens, M key tokens, D width or head width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from difa_fx.cost import SiteShape
from difa_fx.passes.batch_axis import LostBatchError, batch_axes, follow
from difa_fx.passes.canonicalize import CanonicalGraph
from difa_fx.passes.graph_tools import (
    ancestors,
    arg,
    block_of,
    descendants,
    module_path,
    placeholders,
    shape_of,
    tensor_of,
    within,
)
from difa_fx.passes.inputs import DenoiserInputs, denoiser_inputs
from difa_fx.plan import Method

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default
_PROJECTIONS = {
    aten.linear.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.mm.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten.conv1d.default: (0, 1),
    aten.conv2d.default: (0, 1),
}
"""Operation to the positions of its data and its weight."""

_WEIGHT_OUT_FIRST = {aten.linear.default, aten.conv1d.default, aten.conv2d.default}

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
}
"""Operations that only move or cast what they read."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSite:
    """One self-attention that a plan may change.

    Attributes:
        path: the module it lives in, for instance ``transformer_blocks.3.attn1``.
        kind: ``self``; the anchor's queries, keys and values are projected from one source.
        anchor: the attention node.
        source: the tensor that the region reads, [B, N, D] as a rule: the projections' input, or what the
            norm and modulation before them read when nothing else reads their result.
        output: the last node of the region: what ``cached`` keeps.
        region: every node from the source (left out) to the output, in graph order.
        axes: batch axis of the source, of every region node and of each side input, as far as they have one.
        refused: method to the reason why it is not possible here.
        projection_flops: floating point operations of the region's projections, for the whole batch.
    """

    path: str
    kind: str
    anchor: fx.Node
    source: fx.Node
    output: fx.Node
    region: tuple[fx.Node, ...]
    axes: Mapping[fx.Node, int]
    refused: Mapping[Method, str]
    projection_flops: int

    @property
    def q_shape(self) -> tuple[int, ...]:
        """Query shape, [B, H, N, D]."""
        return shape_of(self.anchor.args[0])  # type: ignore[arg-type]

    @property
    def kv_tokens(self) -> int:
        """Number of keys, M."""
        return shape_of(self.anchor.args[1])[-2]  # type: ignore[arg-type]

    @property
    def shape(self) -> SiteShape:
        """Its sizes for the whole batch, as the cost model takes them."""
        *batch, heads, tokens, width = self.q_shape
        output = tensor_of(self.output)
        assert output is not None
        return SiteShape(
            batch=math.prod(batch),
            heads=heads,
            tokens=tokens,
            kv_tokens=self.kv_tokens,
            head_dim=width,
            projection_flops=self.projection_flops,
            output_numel=output.numel(),
            itemsize=output.element_size(),
        )

    @property
    def methods(self) -> tuple[Method, ...]:
        """What this site can do at a step."""
        return tuple(method for method in Method if method not in self.refused)

    def moved(self, nodes: Mapping[fx.Node, fx.Node]) -> AttentionSite:
        """The same site in a copy of its graph; ``nodes`` maps old nodes to new ones."""
        return replace(
            self,
            anchor=nodes[self.anchor],
            source=nodes[self.source],
            output=nodes[self.output],
            region=tuple(nodes[node] for node in self.region),
            axes={nodes[node]: axis for node, axis in self.axes.items() if node in nodes},
        )


@dataclass(frozen=True, slots=True, eq=False)
class RejectedSite:
    """An attention that is left as it is, and why."""

    path: str
    node: fx.Node
    reason: str


@dataclass(frozen=True, slots=True)
class Attention:
    """Everything the search found in one graph."""

    sites: tuple[AttentionSite, ...]
    rejected: tuple[RejectedSite, ...]
    inputs: DenoiserInputs

    def __post_init__(self) -> None:
        paths = [site.path for site in self.sites]
        assert len(set(paths)) == len(paths), "site paths are unique"


@dataclass(slots=True)
class _Search:
    """What the walk over one graph knows."""

    stream: set[fx.Node]
    from_parameters: set[fx.Node]
    axes: dict[fx.Node, int]
    lost: dict[fx.Node, LostBatchError]
    batch: int | None
    order: dict[fx.Node, int] = field(default_factory=dict)


def find_attention(canonical: CanonicalGraph) -> Attention:
    """Every attention of a canonical graph, as sites and rejected sites in graph order."""
    graph = canonical.gm.graph
    inputs = denoiser_inputs(canonical)
    search = _prepare(canonical, inputs)
    sites: list[AttentionSite] = []
    rejected: list[RejectedSite] = []
    taken: dict[str, int] = {}
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        found = _site_at(node, search)
        count = taken.get(found.path, 0)
        taken[found.path] = count + 1
        if count:
            found = replace(found, path=f"{found.path}#{count}")
        if isinstance(found, AttentionSite):
            sites.append(found)
        else:
            rejected.append(found)
    return Attention(tuple(sites), tuple(rejected), inputs)


def _prepare(canonical: CanonicalGraph, inputs: DenoiserInputs) -> _Search:
    graph = canonical.gm.graph
    nodes = placeholders(graph)
    dynamic = [n for n in nodes if n not in canonical.parameters]
    roots = dynamic if inputs.latents is None else [nodes[inputs.latents]]
    batched = inputs.latents is not None and inputs.batch is not None and inputs.batch > 1
    axes, lost = batch_axes(graph, {roots[0]: 0}) if batched else ({}, {})
    changing = descendants(dynamic)
    order = {node: i for i, node in enumerate(graph.nodes)}
    return _Search(
        stream=descendants(roots),
        from_parameters={n for n in graph.nodes if n not in changing},
        axes=axes,
        lost=lost,
        batch=inputs.batch,
        order=order,
    )


def _site_at(anchor: fx.Node, search: _Search) -> AttentionSite | RejectedSite:
    projections = [_climb(anchor.args[i], search) for i in range(3)]  # type: ignore[arg-type]
    path = _common_path([anchor, *(p for found in projections for p in found)])

    def reject(reason: str) -> RejectedSite:
        return RejectedSite(path, anchor, reason)

    if not search.stream.intersection(anchor.all_input_nodes):
        return reject("nothing it reads depends on the latents")
    for letter, found in zip("qkv", projections, strict=True):
        if letter == "q" and not found:
            return reject("no linear projection of the latents leads to its queries")
    q, k, v = ({_data(p) for p in found} for found in projections)
    if not k or not v or not (q & k):
        return reject("cross-attention: its keys and values come from another source than its queries")
    if len(q | k | v) > 1:
        return reject("joint attention: tokens of several sources are concatenated")
    (source,) = q
    output = _descend(anchor, search)
    if output is None:
        return reject("no output projection follows it")
    core = (descendants([source]) & ancestors([output])) - {source}
    source, prelude = _prelude(source, core, path, search)
    region = tuple(sorted(core | prelude, key=search.order.__getitem__))
    axes, refused = _refusals(anchor, source, output, region, search)
    flops = sum(_linear_flops(node) for node in region if node.target in _PROJECTIONS)
    return AttentionSite(path, "self", anchor, source, output, region, axes, refused, flops)


def _climb(start: fx.Node, search: _Search) -> list[fx.Node]:
    """The projections that ``start`` is computed from, not looking beyond them."""
    found: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [start]
    while stack:
        node = stack.pop()
        if node in seen or node not in search.stream:
            continue
        seen.add(node)
        if _is_projection(node, search):
            found.append(node)
        else:
            stack.extend(node.all_input_nodes)
    return sorted(found, key=search.order.__getitem__)


def _is_projection(node: fx.Node, search: _Search) -> bool:
    positions = _PROJECTIONS.get(node.target)  # type: ignore[call-overload]
    if positions is None:
        return False
    weight = node.args[positions[1]]
    return isinstance(weight, fx.Node) and weight in search.from_parameters


def _data(projection: fx.Node) -> fx.Node:
    source = projection.args[_PROJECTIONS[projection.target][0]]  # type: ignore[index]
    assert isinstance(source, fx.Node)
    return source


def _common_path(nodes: Iterable[fx.Node]) -> str:
    """The innermost module that all ``nodes`` live in."""
    parts = [module_path(node).split(".") for node in nodes]
    calls = {part[-1].partition("@")[2] for part in parts} - {""}
    levels = zip(*([level.partition("@")[0] for level in part] for part in parts), strict=False)
    common = [level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels)]
    path = ".".join(common) or "attention"
    return f"{path}@{max(calls)}" if calls else path


def _descend(anchor: fx.Node, search: _Search) -> fx.Node | None:
    """The end of the region: through the output projection, up to a gate, residual or fork."""
    node, projected = anchor, False
    while len(node.users) == 1:
        (user,) = node.users
        if _is_projection(user, search) and _data(user) is node:
            if projected:
                break
            projected = True
        elif not _only_moves_or_scales(user, node, search) or tensor_of(user) is None:
            break
        node = user
    return node if projected else None


def _prelude(source: fx.Node, core: set[fx.Node], path: str, search: _Search) -> tuple[fx.Node, set[fx.Node]]:
    """Norm and modulation in front of the projections, as far as nothing else reads them.

    They belong to the region: a ``+cfg`` step need not compute them for the half that it drops.
    """
    prelude: set[fx.Node] = set()
    block = block_of(path)
    while (
        source.op == "call_function"
        and source not in core
        and not _is_projection(source, search)
        and all(user in core or user in prelude for user in source.users)
        and within(module_path(source), block)
    ):
        above = [node for node in source.all_input_nodes if node in search.stream]
        if len(above) != 1 or tensor_of(above[0]) is None:
            break
        prelude.add(source)
        source = above[0]
    return source, prelude


def _only_moves_or_scales(user: fx.Node, node: fx.Node, search: _Search) -> bool:
    others = [source for source in user.all_input_nodes if source is not node]
    if user.target in _CARRIERS:
        return not others
    scales = user.target in (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor)
    return scales and all(source in search.from_parameters for source in others)


def _refusals(
    anchor: fx.Node, source: fx.Node, output: fx.Node, region: tuple[fx.Node, ...], search: _Search
) -> tuple[dict[fx.Node, int], dict[Method, str]]:
    refused: dict[Method, str] = {}
    window = _window_refusal(anchor)
    if window:
        refused[Method.WINDOW] = refused[Method.WINDOW_CFG] = window
    axes: dict[fx.Node, int] = {}
    try:
        axes = _follow_region(source, output, region, search)
    except LostBatchError as error:
        refused[Method.FULL_CFG] = refused[Method.WINDOW_CFG] = str(error)
    return axes, refused


def _follow_region(
    source: fx.Node, output: fx.Node, region: tuple[fx.Node, ...], search: _Search
) -> dict[fx.Node, int]:
    """Batch axes of the region, its source and its side inputs.

    Raises:
        LostBatchError: the batch is odd, or an operation of the region does not carry it.
    """
    if search.batch is None or search.batch % 2:
        raise LostBatchError(source, f"a batch of {search.batch} has no two halves")
    if source not in search.axes:
        cause = search.lost.get(source)
        raise cause or LostBatchError(source, "the batch axis is not known here")
    axes = {source: search.axes[source]}
    inner = set(region)
    for node in region:
        for side in node.all_input_nodes:
            if side not in inner and side in search.axes:
                axes[side] = search.axes[side]
        step = follow(node, axes)
        if step is None:
            continue
        axes[node] = step.axis
    if output not in axes:
        raise LostBatchError(output, "its result does not carry the batch")
    return axes


def _window_refusal(anchor: fx.Node) -> str | None:
    q, k = (shape_of(anchor.args[i]) for i in (0, 1))  # type: ignore[arg-type]
    if len(q) != 4:
        return f"its queries have {len(q)} axes; a window needs [B, H, N, D]"
    if q[-2] != k[-2]:
        return f"{q[-2]} queries meet {k[-2]} keys; a window needs as many of both"
    if q[1] != k[1]:
        return f"{q[1]} query heads share {k[1]} key heads"
    if arg(anchor, "is_causal"):
        return "it is causal"
    if arg(anchor, "dropout_p"):
        return "it has dropout"
    return None


def _linear_flops(node: fx.Node) -> int:
    data, weight = (node.args[i] for i in _PROJECTIONS[node.target])  # type: ignore[index]
    assert isinstance(data, fx.Node) and isinstance(weight, fx.Node)
    inner = shape_of(weight)[1:] if node.target in _WEIGHT_OUT_FIRST else shape_of(data)[-1:]
    return 2 * math.prod(shape_of(node)) * math.prod(inner)
