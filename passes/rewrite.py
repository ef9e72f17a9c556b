"""rewrite: a segment and what is asked of it -> the variant that does so, as a pure function.

A variant yields what its step reads and no more: what a trunk makes for a region that does not run leaves its graph.

State is explicit.  A window step takes the stored residual as one more input after the region's own; a full step
that must refresh it hands it out as one more output.  A site's output is an ordinary value between two segments,
so to cache it is to keep that value, and to reuse it is not to call the region.  A ``+cfg`` region yields, and a
``window+cfg`` region reads, the conditional half alone; the trunk that reads it uses it for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from difa_fx import attention
from difa_fx._torch import FakeTensor, propagate
from difa_fx.errors import GraphError, SiteError
from difa_fx.passes.cached_output import cached_output
from difa_fx.passes.cfg_shared import cfg_shared
from difa_fx.passes.graph_tools import crossing_value, output_values, placeholders, remove_dead
from difa_fx.passes.partition import Segment, extract
from difa_fx.passes.sites import AttentionSite
from difa_fx.passes.window_attention import window_attention, window_residual
from difa_fx.plan import Method, Window
from difa_fx.schedule import SiteAction, SiteStep


@dataclass(frozen=True, slots=True)
class Variant:
    """What is asked of a segment.

    Attributes:
        action: what its site does; None for a trunk.
        halves: inputs that come as the conditional half of the batch and stand for both; position and batch axis.
        unread: positions of the outputs that nothing reads at such a step, and that it does not yield.
    """

    action: SiteAction | None = None
    halves: tuple[tuple[int, int], ...] = ()
    unread: tuple[int, ...] = ()

    def __str__(self) -> str:
        words = [] if self.action is None else [str(self.action)]
        words += ["of a half"] if self.halves else []
        return " ".join([*words, *(["less"] if self.unread else [])])


@dataclass(frozen=True, slots=True, eq=False)
class VariantGraph:
    """A segment rewritten.

    Attributes:
        gm: its graph.  Inputs are the segment's, then the residual if one is read; outputs are those of the segment's
            that are read, then the residual if one is written.
        inputs: fake tensors, one a placeholder.
    """

    gm: fx.GraphModule
    inputs: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class RewriteSettings:
    """What a plan and the options say about every site.

    Attributes:
        window: how far tokens see at a window step.
        second: whether the conditional half of the batch is the second one.
        kernel: the ``window_kernel`` option.
    """

    window: Window
    second: bool
    kernel: str


def rewrite(segment: Segment, variant: Variant, settings: RewriteSettings) -> VariantGraph:
    """A variant of ``segment``, shape-propagated and linted.

    Args:
        segment: a segment of the partition; it is not edited.
        variant: what is asked of it.
        settings: window, CFG order and kernel.

    Raises:
        SiteError: the site cannot do its action; the message has the reason.
    """
    gm, moved = extract(segment)
    graph, action = gm.graph, variant.action
    expected = [node.meta["val"] if node in segment.returned else crossing_value(node) for node in segment.outputs]
    if segment.site is not None and action is not None:
        check_possible(segment.site, action.method)
        outputs = _act(graph, segment.site.moved(moved), action, settings)
        if action.method.shares_cfg:
            axes = [segment.site.axes[node] for node in segment.outputs]
            expected = [half_of(value, axis) for value, axis in zip(expected, axes, strict=True)]
        graph.output_node().args = (tuple(outputs),)
    _widen(graph, variant.halves)
    if variant.unread:
        kept = [i for i in range(len(expected)) if i not in variant.unread]
        expected = [expected[i] for i in kept]
        graph.output_node().args = (tuple(output_values(graph)[i] for i in kept),)
    remove_dead(graph)
    graph.lint()
    gm.recompile()
    values = tuple(node.meta["val"] for node in placeholders(graph))
    _keep_layout(gm, values, expected)
    return VariantGraph(gm, values)


def _widen(graph: fx.Graph, halves: Sequence[tuple[int, int]]) -> None:
    """Let inputs come as halves; what reads them makes both halves of the batch from one on the way."""
    inputs = placeholders(graph)
    for position, axis in halves:
        half, whole = inputs[position], inputs[position].meta["val"]
        readers = list(half.users)
        with graph.inserting_after(inputs[-1]):
            shared = graph.call_function(attention.cfg_shared, (half,), {"axis": axis})
        for reader in readers:
            reader.replace_input_with(half, shared)
        half.meta["val"], shared.meta["val"] = half_of(whole, axis), whole


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
    moved: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, moved))
    rewritten = fx.GraphModule(gm, graph)
    written: list[fx.Node] = []
    for original in sites:
        site, entry = original.moved(moved), row[original.path]
        if entry.action.method is Method.CACHED:
            axes = site.output_axes if entry.output_half else None
            values = [output.meta["val"] for output in site.outputs]
            if axes is not None:
                values = [half_of(value, axis) for value, axis in zip(values, axes, strict=True)]
            states = [_add_input(graph, "output_in", value) for value in values]
            cached_output(graph, site, states, shared_axes=axes)
            continue
        half = entry.residual_half and not entry.action.method.shares_cfg
        made = _act(graph, site, entry.action, settings, half_residual=half)
        written += made[len(site.outputs) :]
    graph.output_node().args = ((*output_values(graph), *written),)
    remove_dead(graph)
    graph.lint()
    rewritten.recompile()
    return rewritten


def _act(
    graph: fx.Graph,
    site: AttentionSite,
    action: SiteAction,
    settings: RewriteSettings,
    *,
    half_residual: bool = False,
) -> list[fx.Node]:
    """Make ``site`` do ``action``; the nodes of its outputs, and of the residual if it writes one.

    ``half_residual``: the residual it reads for the whole batch holds the conditional half alone.
    """
    whole = site
    if action.method.shares_cfg:
        site = cfg_shared(graph, site, second=settings.second)
    if action.method.windowed:
        value = _stored_residual(whole)
        if half_residual or action.method.shares_cfg:
            value = half_of(value, residual_axis(whole))
        window_attention(
            graph,
            site,
            _add_input(graph, "residual_in", value),
            window=settings.window,
            kernel=settings.kernel,
            shared_axis=residual_axis(whole) if half_residual else None,
        )
    if action.writes_residual:
        missed = window_residual(graph, site, window=settings.window, kernel=settings.kernel)
        return [*site.outputs, missed]
    return list(site.outputs)


def residual_axis(site: AttentionSite) -> int:
    """Batch axis of a site's stored residual, [B, N, H, D] where attention is [B, H, N, D].

    Raises KeyError when the batch is not followed there.
    """
    axis = site.call.batch_axis(site.axes[site.call.result])
    return {1: 2, 2: 1}.get(axis, axis)


def _stored_residual(site: AttentionSite) -> Tensor:
    value = site.call.q.meta["val"]
    assert isinstance(value, FakeTensor)
    batch, heads, tokens, width = site.call.q_shape
    with value.fake_mode:
        return torch.empty((batch, tokens, heads, width), dtype=value.dtype, device=value.device)


def half_of(value: Tensor, axis: int) -> Tensor:
    """A contiguous fake of half the batch."""
    return value.narrow(axis, 0, value.shape[axis] // 2).contiguous()


def _add_input(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    last = placeholders(graph)
    with graph.inserting_after(last[-1]) if last else graph.inserting_before():
        node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def _keep_layout(gm: fx.GraphModule, inputs: Sequence[object], expected: Sequence[Tensor]) -> None:
    """Give the outputs the shape, dtype and strides that later pieces are compiled for.

    A wrong shape or dtype is a fault of a rewrite and is raised at once.

    Raises:
        GraphError: one is a number that is known at run time alone.
        SiteError: a rewrite is wrong.
    """
    values = list(output_values(gm.graph))
    for position, (value, want) in enumerate(zip(propagate(gm, inputs), expected, strict=False)):
        node = values[position]
        if not isinstance(value, Tensor):
            raise GraphError(
                "a number is read from a tensor while the denoiser runs, and used on both sides of a site: Dynamo "
                "makes such of a Python float that changes between calls",
                where=str(node),
                got=type(value).__name__,
                allowed="numbers that stay the same, and tensors",
                todo="pass the number as a tensor, or always the same one (LoRA: set its scale on the adapter); or set "
                "torch._dynamo.config.specialize_float = True, which compiles once for each value",
            )
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
