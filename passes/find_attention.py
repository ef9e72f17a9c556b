"""find_attention: where the attention is, what kind it is, and what a plan may make of it.  No edit.

The search anchors at the attention itself (:mod:`difa_fx.passes.attention_calls`), climbs from its query, key and
value to the projections, and descends to the output projection (:mod:`difa_fx.passes.regions`), all by data flow::

    source_BND -> linear -> view, transpose -> q_BHND -.
               -> linear -> ...             -> k_BHND --> attention -> transpose, view -> linear -> output_BND
               -> linear -> ...             -> v_BHND -'

Letters: B batch, H heads, N tokens, M key tokens, D width or head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import fx

from difa_fx.passes.attention_calls import AttentionCall, UnreadCall, attention_calls
from difa_fx.passes.batch_axis import batch_axes, begins_pair, follow
from difa_fx.passes.batch_step import LostBatchError
from difa_fx.passes.canonicalize import CanonicalGraph
from difa_fx.passes.explicit_attention import linear_attention
from difa_fx.passes.graph_tools import (
    ancestors,
    call_of,
    descendants,
    module_path,
    output_values,
    owner_path,
    placeholders,
    shape_of,
)
from difa_fx.passes.inputs import DenoiserInputs, denoiser_inputs, is_condition, source_name
from difa_fx.passes.regions import Search, climb, data_of, descend, meeting, origin, projection_flops
from difa_fx.passes.sites import Attention, AttentionSite, Origin, RejectedSite
from difa_fx.passes.token_axis import token_runs
from difa_fx.plan import Method

__all__ = ["Attention", "AttentionSite", "RejectedSite", "find_attention"]


def find_attention(canonical: CanonicalGraph, origins: Mapping[int, Origin] | None = None) -> Attention:
    """Every attention of a canonical graph, as sites and rejected sites in graph order.

    Args:
        canonical: the graph.
        origins: where the denoiser runs as several graphs, what is known of inputs that another one made, by position.
    """
    origins = origins or {}
    inputs = denoiser_inputs(canonical, {position: origin.stream for position, origin in origins.items()})
    calls = list(attention_calls(canonical.gm.graph))
    search = _prepare(canonical, inputs, [call for call in calls if isinstance(call, AttentionCall)], origins)
    calls = sorted([*calls, *_linear(canonical.gm.graph, search)], key=lambda call: search.order[call.node])
    sites: list[AttentionSite] = []
    rejected: list[RejectedSite] = []
    taken: dict[str, int] = {}
    for call in calls:
        found = _site_of(call, search)
        count = taken.get(found.path, 0)
        taken[found.path] = count + 1
        if count:
            found = replace(found, path=f"{found.path}#{count}")
        if isinstance(found, AttentionSite):
            sites.append(found)
        else:
            rejected.append(found)
    inputs = replace(inputs, doubled=search.doubled)
    return Attention(tuple(sites), tuple(rejected), inputs, tuple(_results(canonical, search)))


def _results(canonical: CanonicalGraph, search: Search) -> Iterator[Origin]:
    for value in output_values(canonical.gm.graph)[len(canonical.written) :]:
        known = isinstance(value, fx.Node)
        yield Origin(known and value in search.stream, search.tokens.get(value) if known else None)


def _prepare(
    canonical: CanonicalGraph,
    inputs: DenoiserInputs,
    calls: Iterable[AttentionCall],
    origins: Mapping[int, Origin],
) -> Search:
    graph = canonical.gm.graph
    nodes = placeholders(graph)
    dynamic = [n for n in nodes if n not in canonical.parameters]
    roots = [nodes[position] for position in inputs.samples]
    roots += [nodes[position] for position, origin in origins.items() if origin.stream and nodes[position] not in roots]
    named = {node: source_name(source) for node, source in zip(nodes, canonical.sources, strict=True)}
    roots = roots or [
        n for i, n in enumerate(nodes) if n in dynamic and i not in origins and not is_condition(named[n])
    ]
    changing, stream = descendants(dynamic), descendants(roots, values=True)
    batch, seeds = _batch(graph, inputs, roots, stream)
    axes, lost = batch_axes(graph, seeds)
    return Search(
        stream=stream,
        changing=changing,
        from_parameters={n for n in graph.nodes if n not in changing},
        axes=axes,
        lost=lost,
        batch=batch,
        tokens=token_runs(
            graph,
            stream,
            {call.result: (call.q, call.result_axis) for call in calls},
            {nodes[position]: origin.tokens for position, origin in origins.items() if origin.tokens is not None},
        ),
        order={node: i for i, node in enumerate(graph.nodes)},
        modules={
            node: owner_path(source)
            for node, source in zip(nodes, canonical.sources, strict=True)
            if node in canonical.parameters
        },
        doubled=any(node.op != "placeholder" for node in seeds),
    )


def _batch(
    graph: fx.Graph, inputs: DenoiserInputs, roots: Sequence[fx.Node], stream: set[fx.Node]
) -> tuple[int | None, dict[fx.Node, int]]:
    """The batch, and the nodes where it begins with their axis: the latents, or what is made of them twice."""
    pairs = _pairs(graph, inputs, stream)
    if pairs:
        return shape_of(pairs[0])[0], dict.fromkeys(pairs, 0)
    batched = inputs.latents is not None and inputs.batch is not None and inputs.batch > 1
    return inputs.batch, {root: 0 for root in roots if shape_of(root)[0] == inputs.batch} if batched else {}


def _pairs(graph: fx.Graph, inputs: DenoiserInputs, stream: set[fx.Node]) -> list[fx.Node]:
    """Where a denoiser doubles its latents to make guidance itself: each such place that has no other before it."""
    found: list[fx.Node] = []
    for node in graph.nodes:
        if inputs.batch is None or node not in stream or node.op != "call_function":
            continue
        doubles = begins_pair(node, inputs.batch) and stream.issuperset(node.all_input_nodes)
        if doubles and not ancestors([node]).intersection(found):
            found.append(node)
    return [node for node in found if shape_of(node)[0] == shape_of(found[0])[0]]


def _linear(graph: fx.Graph, search: Search) -> Iterator[UnreadCall]:
    """Every linear attention: a product of three tensors that all depend on the latents."""
    for node in graph.nodes:
        operands = linear_attention(node)
        if operands is not None and search.stream.issuperset(operands):
            yield UnreadCall(node, "linear attention: it has no softmax, so there are no scores to cut to a window")


def _site_of(call: AttentionCall | UnreadCall, search: Search) -> AttentionSite | RejectedSite:
    if isinstance(call, UnreadCall):
        return RejectedSite(module_path(call.node) or "attention", call.node, call.reason)
    projections = [climb(node, search) for node in (call.q, call.k, call.v)]
    path = _common_path([call.result, *(p for found in projections for p in found)], search)
    sources = _sources(call, projections, path, search)
    if isinstance(sources, str):
        return RejectedSite(path, call.result, sources)
    outputs = descend(call.result, search)
    region = search.sorted((descendants(sources) & ancestors(outputs)) - set(sources))
    runs = search.tokens.get(call.q)
    runs = runs if runs is not None and runs.axis == call.token_axis else None
    kind = "joint" if len(sources) > 1 or (runs is not None and runs.is_joint) else "self"
    text = runs.text if runs is not None and runs.is_joint else (0, 0)
    refused: dict[Method, str] = {}
    window = _window_refusal(call, kind, text, known=runs is not None)
    if window:
        refused[Method.WINDOW] = refused[Method.WINDOW_CFG] = window
    axes = {}
    try:
        axes = _follow_region(sources, outputs, region, search)
    except LostBatchError as error:
        refused[Method.FULL_CFG] = refused[Method.WINDOW_CFG] = str(error)
    if call.refused_halves:
        refused.setdefault(Method.FULL_CFG, call.refused_halves)
        refused.setdefault(Method.WINDOW_CFG, call.refused_halves)
    flops = sum(map(projection_flops, region))
    return AttentionSite(path, kind, call, sources, outputs, region, axes, text or (0, 0), refused, flops)


def _sources(
    call: AttentionCall, projections: list[tuple[fx.Node, ...]], path: str, search: Search
) -> tuple[fx.Node, ...] | str:
    """The tensors that the projections read, or why this attention is left alone."""
    if not search.stream.intersection((call.q, call.k, call.v)):
        return "nothing it reads depends on the latents"
    if not projections[0] or call.q not in search.stream:
        return "no linear projection of the latents leads to its queries"
    q, k, v = ({data_of(p, search) for p in found} for found in projections)
    q, k, v = ({origin(source, q | k | v, path, search) for source in found} for found in (q, k, v))
    if q == k == v or (q <= k and q <= v):
        return search.sorted(q | k | v)
    met = meeting(q, k | v, path, search) if k and v and not q & (k | v) else None
    if met is not None:
        return (met,)
    if not (q & k) or not (q & v):
        return "cross-attention: its keys and values come from another source than its queries"
    return "its queries come from sources that its keys or values do not come from"


def _common_path(nodes: Sequence[fx.Node], search: Search) -> str:
    """The innermost module that all ``nodes`` live in, the first of them being the attention itself.

    Where a trace does not say (in a ``torch.autograd.Function``), it is the one that has the projections' parameters.
    """
    first, *projections = nodes
    path = _prefix(module_path(node).partition("@")[0] for node in nodes)
    if not path:
        near = (source for node in projections for source in node.all_input_nodes)
        owners = [
            search.modules[n] for n in ancestors(n for n in near if n in search.from_parameters) if n in search.modules
        ]
        return _prefix(owner.rpartition(".")[0] for owner in owners) or "attention"
    call = call_of(first, path)
    return path + (f"@{call}" if call else "")


def _prefix(paths: Iterable[str]) -> str:
    """The innermost module that holds all of these."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))


def _follow_region(
    sources: tuple[fx.Node, ...], outputs: tuple[fx.Node, ...], region: tuple[fx.Node, ...], search: Search
) -> dict[fx.Node, int]:
    """Batch axes of the region, its sources and its side inputs.

    Raises:
        LostBatchError: the batch is odd, or an operation of the region does not carry it.
    """
    axes = _source_axes(sources, search)
    inner = set(region)
    for node in region:
        axes |= {side: search.axes[side] for side in node.all_input_nodes if side not in inner and side in search.axes}
        step = follow(node, axes)
        if step is not None:
            axes[node] = step.axis
    lost = [output for output in outputs if output not in axes]
    if lost:
        raise LostBatchError(lost[0], "its result does not carry the batch")
    return axes


def _source_axes(sources: tuple[fx.Node, ...], search: Search) -> dict[fx.Node, int]:
    """Batch axes of the sources.

    Text that no earlier layer has touched is not followed from the latents.  Its batch is taken to be at axis 0 if
    that has the size; should it not be, the concatenation with what is followed refuses it.
    """
    if search.batch is None or search.batch % 2:
        raise LostBatchError(sources[0], f"a batch of {search.batch} has no two halves")
    axes = {source: search.axes[source] for source in sources if source in search.axes}
    if not axes:
        behind = ancestors(sources)
        ends = (error for node, error in search.lost.items() if node in behind)
        raise next(ends, LostBatchError(sources[0], "the batch axis is not known here"))
    return {source: 0 for source in sources if shape_of(source)[0] == search.batch} | axes


def _window_refusal(call: AttentionCall, kind: str, text: tuple[int, int] | None, *, known: bool) -> str | None:
    tokens, keys = call.q_shape[-2], call.kv_tokens
    queries, shared = call.heads
    reasons = {
        call.refused: bool(call.refused),
        f"its queries have {len(call.q_shape)} axes; a window needs [B, H, N, D]": len(call.q_shape) != 4,
        f"{tokens} queries meet {keys} keys; a window needs as many of both": tokens != keys,
        "no concatenation in the graph tells which of its tokens are text": kind == "joint" and not known,
        "its image tokens do not stand in one run": text is None,
        f"{queries} query heads cannot share {shared} key heads": queries % shared != 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
