"""From a segment and its variant to a piece: one compilation for each (signature, variant), and no other.

A *piece* is a variant of a structurally unique segment, compiled.  Parameters are inputs, so all equal layers
share it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from tqdm.auto import tqdm

from difa_fx._torch import (
    CUDA_GRAPHS,
    BoxedPiece,
    begin_lowering,
    compile_aot_eager,
    compile_inductor,
    deferred_kernels,
    trace_aten,
)
from difa_fx.attention import prepare, window_attention, window_residual
from difa_fx.passes.autocast import without_autocast
from difa_fx.passes.partition import Segment
from difa_fx.passes.rewrite import RewriteSettings, Variant, VariantGraph, rewrite
from difa_fx.passes.sites import AttentionSite
from difa_fx.plan_words import CFGOrder, Window

COMPILERS = ("inductor", "aot_eager", "eager")

Piece = BoxedPiece
"""Takes a list, which it empties: a segment's inputs and then a residual it reads.  Gives those of the segment's
outputs that are read, and then a residual it writes."""

_PATCHES = {"size_asserts": False}
"""Sizes and strides are known: Dynamo guards those of the graph's inputs, and those that cross pieces were settled when
the pieces were made.  To check them again costs 2 % of a call where layers are small."""

PieceKey = tuple[str, Variant]


@dataclass(slots=True)
class PieceCompiler:
    """Compiles pieces on demand and keeps them.

    Attributes:
        compiler: ``inductor``, or ``aot_eager`` or ``eager`` to debug.
        patches: Inductor's settings.
        settings: what every rewrite needs.
        pieces: what was compiled so far.
        seconds: time spent on it.
    """

    compiler: str
    patches: Mapping[str, Any]
    settings: RewriteSettings
    pieces: dict[PieceKey, Piece] = field(default_factory=dict)
    seconds: float = 0.0

    @without_autocast()
    def compile_all(self, wanted: Iterable[tuple[Segment, Variant]]) -> None:
        """Compile every piece of ``wanted`` that is not there yet, under a progress bar."""
        missing: dict[PieceKey, Segment] = {}
        for segment, variant in wanted:
            if (segment.signature, variant) not in self.pieces:
                missing.setdefault((segment.signature, variant), segment)
        started = time.perf_counter()
        graphs = {key: rewrite(segment, key[1], self.settings) for key, segment in missing.items()}
        begun = {key: self._begin(graph) for key, graph in graphs.items()}
        bar = tqdm(missing.items(), desc="difa: compile", unit="piece", disable=None, leave=False)
        on_cuda = any(isinstance(x, Tensor) and x.is_cuda for graph in graphs.values() for x in graph.inputs)
        with bar, nullcontext() if on_cuda else deferred_kernels():
            for key, segment in bar:
                bar.set_postfix_str(f"{segment.name} {key[1]}"[:60])
                self.pieces[key] = begun[key]()
        self.seconds += time.perf_counter() - started

    def piece(self, segment: Segment, variant: Variant) -> Piece:
        """The piece for a variant of ``segment``, which :meth:`compile_all` has made."""
        return self.pieces[segment.signature, variant]

    def _begin(self, graph: VariantGraph) -> Callable[[], Piece]:
        """Trace a variant's graph; the result compiles it."""
        gm, inputs = graph.gm, graph.inputs
        if self.compiler == "eager":
            return lambda: _boxed(gm)
        if self.compiler == "aot_eager":
            return lambda: _boxed(trace_aten(gm, inputs))
        return begin_lowering(gm, inputs, {**_PATCHES, **self.patches, **_flex_patches(graph)})


def compile_whole(
    gm: fx.GraphModule, inputs: Sequence[Any], compiler: str, inductor: Mapping[str, Any]
) -> Callable[..., Any]:
    """A graph in which nothing is changed; see :class:`difa_fx.options.Options`."""
    if compiler == "eager":
        return gm
    if compiler == "aot_eager":
        return compile_aot_eager(gm, inputs)
    return compile_inductor(gm, inputs, inductor)


def compiler_for(
    sites: Sequence[AttentionSite],
    *,
    compiler: str,
    inductor: Mapping[str, Any],
    kernel: str,
    window: Window,
    cfg: CFGOrder | None,
    windows: bool,
) -> PieceCompiler:
    """What compiles the pieces of a denoiser with these sites, whether a plan runs on them or a search.

    Args:
        sites: the denoiser's.
        compiler: see :class:`difa_fx.options.Options`.
        inductor: likewise.
        kernel: likewise, ``window_kernel``.
        window: tokens to either side.
        cfg: the order of the CFG halves.
        windows: whether any site may run a window; its kernel is built in the background then.
    """
    if kernel == "auto" and windows:
        for site in sites:
            prepare(site.call.q.meta["val"], site.shape.tokens)
    settings = RewriteSettings(window=window, second=cfg == "uncond_first", kernel=kernel)
    # A call of the denoiser is one CUDA graph, and not a graph a piece.
    return PieceCompiler(compiler, {**inductor, CUDA_GRAPHS: False}, settings)


def _boxed(gm: fx.GraphModule) -> Piece:
    return lambda values: gm(*values)


def _flex_patches(graph: VariantGraph) -> dict[str, Any]:
    """Inductor's C++ flex template cannot take a fused epilogue; on CPU fusion is off for its pieces."""
    for node in graph.gm.graph.nodes:
        flex = node.target in (window_attention, window_residual) and node.kwargs["kernel"] == "flex"
        if flex and node.args[0].meta["val"].device.type == "cpu":
            return {"epilogue_fusion": False}
    return {}
