"""What difa_fx sees in a denoiser, without compiling it: every attention, and what a plan could make of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from difa_fx._torch import apart_from_dynamo, input_sources
from difa_fx.between_graphs import BetweenGraphs
from difa_fx.boundary import refuse_wrapped, unforeseen_is_typed
from difa_fx.cost import site_flops
from difa_fx.outside_graphs import Break, break_of, outside_graphs
from difa_fx.passes.canonicalize import CanonicalGraph, canonicalize
from difa_fx.passes.find_attention import Attention, find_attention
from difa_fx.passes.graph_tools import placeholders, takes_tensors
from difa_fx.passes.inputs import source_name
from difa_fx.passes.partition import partition
from difa_fx.passes.sites import Origin
from difa_fx.plan import Method
from difa_fx.session import module_of


def _cpu_attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    *_, keys, width = value
    return int(2 * math.prod(query) * keys + 2 * math.prod(query[:-1]) * keys * width)


_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops}
"""torch's counter knows the attention operators of CUDA alone, and before 2.13 no grouped queries."""


@dataclass(frozen=True, slots=True)
class SiteReport:
    """One attention that a plan may change.

    Attributes:
        path: its name in a plan.
        kind: ``self``.
        batch: B, folded with whatever the model folds into it.
        heads: H.
        tokens: N.
        head_dim: D.
        flops_share: its projections and attention, as a fraction of the denoiser's matrix operations.
        methods: what it can do at a step.
        refused: method to the reason why it cannot.
    """

    path: str
    kind: str
    batch: int
    heads: int
    tokens: int
    head_dim: int
    flops_share: float
    methods: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class GraphReport:
    """One Dynamo graph of a denoiser.

    Attributes:
        sites: attention that a plan may change, in order.
        rejected: path and reason of each attention that is left alone.
        segments: regions and trunks that a step runs.
        unique_blocks: structurally different ones of the repeated part.
        flops: floating point operations of one call, matrix operations alone.
        latents: name of the input taken for the noisy sample, or None.
        timestep: name of the input the step clock reads, or None.
    """

    sites: tuple[SiteReport, ...]
    rejected: tuple[tuple[str, str], ...]
    segments: int
    unique_blocks: int
    flops: int
    latents: str | None
    timestep: str | None


def inspect(model: nn.Module | Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[GraphReport, ...]:
    """Trace ``model`` on example inputs and report its attention: one record a graph.

    Where Dynamo breaks the denoiser, attention that runs in no graph comes last, in a record of its own, with the
    break.

    The model runs once, eagerly, or twice where there are breaks; nothing is compiled and nothing about it changes.
    Dynamo's caches are cleared first, so other compiled code compiles again at its next call.

    Args:
        model: the denoiser.
        args: its positional inputs.
        kwargs: its keyword inputs.

    Raises:
        GraphError: a graph holds what difa_fx cannot read.
    """
    reports: list[GraphReport] = []
    breaks: list[Break] = []
    between = BetweenGraphs()

    def capture(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        ended = break_of(gm)
        breaks.extend([] if ended is None else [ended])
        origins: Sequence[Origin] | None = None

        def run(*args: Any) -> Any:
            nonlocal origins
            if origins is None:
                with apart_from_dynamo():
                    made, origins = _examined(gm, args, between)
                reports.append(made)
            outputs = gm.forward(*args)
            between.note(outputs, origins)
            return outputs

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=capture, dynamic=False)(*args, **kwargs)
    module = module_of(model)
    if module is not None and (breaks or not reports):
        held = [path for r in reports for path in (*(site.path for site in r.sites), *(path for path, _ in r.rejected))]
        outside = outside_graphs(module, args, kwargs, held, breaks)
        reports += [replace(_NOTHING, rejected=outside)] if outside else []
    return tuple(reports)


_NOTHING = GraphReport((), (), 0, 0, 0, None, None)


def report(gm: fx.GraphModule, inputs: Sequence[Any]) -> GraphReport:
    """What is found in one of Dynamo's graphs; ``inputs`` has a value for each placeholder.

    Raises:
        GraphError: it holds what difa_fx cannot read.
    """
    return _examined(gm, inputs, BetweenGraphs())[0]


def _examined(
    gm: fx.GraphModule, inputs: Sequence[Any], between: BetweenGraphs
) -> tuple[GraphReport, Sequence[Origin]]:
    """What is found in a graph, and what is known of what it yields."""
    refuse_wrapped(gm, inputs)
    if not takes_tensors(inputs):
        return _NOTHING, ()
    with unforeseen_is_typed("inspect"):
        canonical = canonicalize(gm, inputs, sources=input_sources(gm))
        found = find_attention(canonical, between.of(inputs, after=len(canonical.sources) - len(inputs)))
        return _report(canonical, found), found.results


def _report(canonical: CanonicalGraph, found: Attention) -> GraphReport:
    flops = _flops(canonical)
    sites = _site_reports(found, flops)
    parts = partition(canonical, found)
    return GraphReport(
        sites=sites,
        rejected=tuple((site.path, site.reason) for site in found.rejected),
        segments=len(parts.segments),
        unique_blocks=len(parts.unique_blocks),
        flops=flops,
        latents=_name(canonical, found.inputs.latents),
        timestep=_name(canonical, found.inputs.timestep),
    )


def _site_reports(found: Attention, flops: int) -> tuple[SiteReport, ...]:
    reports = []
    for site in found.sites:
        shape = site.shape
        reports.append(
            SiteReport(
                path=site.path,
                kind=site.kind,
                batch=shape.batch,
                heads=shape.heads,
                tokens=shape.tokens,
                head_dim=shape.head_dim,
                flops_share=site_flops(shape, Method.FULL, shape.tokens) / max(flops, 1),
                methods=tuple(method.value for method in site.methods),
                refused=tuple((m.value, reason) for m, reason in site.refused.items()),
            )
        )
    return tuple(reports)


def _flops(canonical: CanonicalGraph) -> int:
    """Matrix operations of one call, counted by torch on fake tensors."""
    inputs = [node.meta["val"] for node in placeholders(canonical.gm.graph)]
    mode = next(v.fake_mode for v in inputs if hasattr(v, "fake_mode"))
    with torch.no_grad(), mode, FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        fx.Interpreter(canonical.gm).run(*inputs)
    return int(counter.get_total_flops())


def _name(canonical: CanonicalGraph, position: int | None) -> str | None:
    return None if position is None else source_name(canonical.sources[position])
