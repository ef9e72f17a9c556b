"""rewrite: a segment and what is asked of it -> the variant that does so, as a pure function.

State is explicit.  A window step takes the stored residual as one more input after the region's own; a full step
that must refresh it hands it out as one more output.  A site's output is an ordinary value between two segments,
so to cache it is to keep that value, and to reuse it is not to call the region.  A segment that reads an output
made for the conditional half alone begins with ``cfg_shared``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from difa_fx import attention
from difa_fx._torch import FakeTensor, propagate
from difa_fx.errors import SiteError
from difa_fx.passes.cached_output import cached_output
from difa_fx.passes.cfg_shared import cfg_shared, spread
from difa_fx.passes.find_attention import AttentionSite
from difa_fx.passes.graph_tools import output_values, placeholders
from difa_fx.passes.partition import Segment, extract
from difa_fx.passes.window_attention import window_attention, window_residual
from difa_fx.plan import Method
from difa_fx.schedule import SiteAction, SiteStep


@dataclass(frozen=True, slots=True)
class Variant:
    """What a segment is to do.

    Attributes:
        action: the site's action; None for a trunk.
        half_inputs: positions of the inputs that hold the conditional half alone, and their batch axes.
    """

    action: SiteAction | None = None
    half_inputs: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        halves = f" reads {len(self.half_inputs)} halves" if self.half_inputs else ""
        return f"{self.action or ''}{halves}".strip()


@dataclass(frozen=True, slots=True, eq=False)
class VariantGraph:
    """A segment rewritten.

    Attributes:
        gm: its graph.  Inputs are the segment's, then the residual if one is read; outputs are the segment's, then
            the residual if one is written.
        inputs: fake tensors, one a placeholder.
    """

    gm: fx.GraphModule
    inputs: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class RewriteSettings:
    """What a plan and the options say about every site.

    Attributes:
        window: tokens to either side.
        second: whether the conditional half of the batch is the second one.
        kernel: the ``window_kernel`` option.
    """

    window: int
    second: bool
    kernel: str


def rewrite(segment: Segment, variant: Variant, settings: RewriteSettings) -> VariantGraph:
    """The variant of ``segment``, shape-propagated and linted; ``segment`` is not edited.

    Raises:
        SiteError: the site cannot do its action; the message has the reason.
    """
    gm, moved = extract(segment)
    graph = gm.graph
    expected = [node.meta["val"] for node in segment.outputs]
    if segment.site is not None and variant.action is not None:
        check_possible(segment.site, variant.action.method)
        site = segment.site.moved(moved)
        outputs = _act(graph, site, variant.action, settings)
        if variant.action.method.shares_cfg:
            expected = [half_of(expected[0], segment.site.axes[segment.site.output])]
        graph.output_node().args = (tuple(outputs),)
    inputs = placeholders(graph)
    for position, axis in variant.half_inputs:
        _spread_input(graph, inputs[position], axis)
    graph.eliminate_dead_code()
    graph.lint()
    gm.recompile()
    values = tuple(node.meta["val"] for node in placeholders(graph))
    _keep_layout(gm, values, expected)
    return VariantGraph(gm, values)


def check_possible(site: AttentionSite, method: Method) -> None:
    """Raise SiteError when ``site`` cannot do ``method``."""
    if method in site.refused:
        raise SiteError(
            f"this site cannot do {method.value!r}: {site.refused[method]}",
            where=site.path,
            got=method.value,
            allowed=[m.value for m in site.methods],
            todo="give the site another method in the plan, or pass strict=False to run it in full",
        )


def rewrite_step(
    gm: fx.GraphModule,
    sites: Sequence[AttentionSite],
    row: Mapping[str, SiteStep],
    settings: RewriteSettings,
) -> fx.GraphModule:
    """One step's whole graph, uncut: what the pieces of that step compute together.

    For people to read and for tests; the state it reads comes in as placeholders ``output_in`` and
    ``residual_in``, the residuals it writes go out after the graph's own outputs, both in site order.

    Args:
        gm: a canonical graph; it is not edited.
        sites: its sites.
        row: what each does.
        settings: window, CFG order and kernel.
    """
    graph = fx.Graph()
    moved: dict[fx.Node, fx.Node] = {}
    results = graph.graph_copy(gm.graph, moved)
    written: list[fx.Node] = []
    for original in sites:
        site, entry = original.moved(moved), row[original.path]
        if entry.action.method is Method.CACHED:
            axis = site.axes[site.output] if entry.output_half else None
            value = site.output.meta["val"]
            state = _add_input(graph, "output_in", value if axis is None else half_of(value, axis))
            cached_output(graph, site, state, shared_axis=axis)
            continue
        _, *residual = _act(graph, site, entry.action, settings)
        written += residual
    graph.output((results, *written) if isinstance(results, fx.Node) else (*results, *written))
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(gm, graph)


def _act(
    graph: fx.Graph, site: AttentionSite, action: SiteAction, settings: RewriteSettings
) -> list[fx.Node]:
    """Make ``site`` do ``action``; the node of its output, and of the residual if it writes one."""
    whole = site
    if action.method.shares_cfg:
        site, _ = cfg_shared(graph, site, second=settings.second)
    if action.reads_residual:
        axis = whole.axes[whole.anchor] if action.reads_half else None
        value = _stored_residual(whole)
        state = _add_input(
            graph, "residual_in", value if axis is None else half_of(value, _swapped(axis))
        )
        window_attention(
            graph,
            site,
            state,
            window=settings.window,
            kernel=settings.kernel,
            shared_axis=None if axis is None or action.method.shares_cfg else _swapped(axis),
        )
    if action.writes_residual:
        missed = window_residual(graph, site, window=settings.window, kernel=settings.kernel)
        return [site.output, missed]
    return [site.output]


def _swapped(axis: int) -> int:
    """An axis of attention's [B, H, N, D] in a residual's [B, N, H, D]."""
    return {1: 2, 2: 1}.get(axis, axis)


def residual_axis(site: AttentionSite) -> int:
    """Batch axis of a site's stored residual.  Raises KeyError when the batch is not followed there."""
    return _swapped(site.axes[site.anchor])


def _stored_residual(site: AttentionSite) -> Tensor:
    value = site.anchor.meta["val"]
    assert isinstance(value, FakeTensor)
    batch, heads, tokens, width = value.shape
    with value.fake_mode:
        return torch.empty((batch, tokens, heads, width), dtype=value.dtype, device=value.device)


def half_of(value: Tensor, axis: int) -> Tensor:
    """A fake of half the batch, its axes in memory in the order of ``value``'s."""
    return torch.empty_like(value.narrow(axis, 0, value.shape[axis] // 2))


def _add_input(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    last = placeholders(graph)
    with graph.inserting_after(last[-1]) if last else graph.inserting_before():
        node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def _spread_input(graph: fx.Graph, node: fx.Node, axis: int) -> None:
    """Use an input that holds one half of the batch for both."""
    whole = node.meta["val"]
    node.meta["val"] = half_of(whole, axis)
    spread(graph, node, axis)


def _keep_layout(gm: fx.GraphModule, inputs: Sequence[object], expected: Sequence[Tensor]) -> None:
    """Give the outputs the shape, dtype and strides that later pieces are compiled for.

    A wrong shape or dtype is a fault of a rewrite and is raised at once.
    """
    values = list(output_values(gm.graph))
    for position, (value, want) in enumerate(zip(propagate(gm, inputs), expected, strict=False)):
        node = values[position]
        if value.shape != want.shape or value.dtype != want.dtype:
            raise SiteError(
                "a rewrite changed what its segment yields",
                where=str(node),
                got=f"{tuple(value.shape)} {value.dtype}",
                allowed=f"{tuple(want.shape)} {want.dtype}",
                todo="please report this with the model",
            )
        if value.stride() != want.stride():
            with gm.graph.inserting_before(gm.graph.output_node()):
                settings = (node, want.stride())
                values[position] = gm.graph.call_function(attention.in_layout, settings)
    gm.graph.output_node().args = (tuple(values),)
    gm.recompile()
