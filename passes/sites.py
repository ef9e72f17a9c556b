"""What a search for attention finds: sites, and attentions that are left alone.

A *region* is everything a site computes, from its sources to its outputs::

    source_BND -> linear q, k, v -> ... -> attention -> ... -> linear -> output_BND

A joint attention may have two sources, the image's and the text's, and two outputs.

Letters: B batch, H heads, N tokens, D width or head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from difa_fx.cost import SiteShape
from difa_fx.passes.attention_call import AttentionCall
from difa_fx.passes.graph_tools import tensor_of
from difa_fx.passes.inputs import DenoiserInputs
from difa_fx.passes.token_axis import Tokens
from difa_fx.plan import Method


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSite:
    """One self-attention or joint attention that a plan may change.

    Attributes:
        path: the module it lives in, for instance ``transformer_blocks.3.attn1``.
        kind: ``self``, or ``joint`` where text and image tokens stand in one sequence.
        call: the attention itself.
        sources: the tensors that the region reads, [B, N, D] as a rule: the projections' inputs, or what several of
            them are made from.
        outputs: the last nodes of the region: what ``cached`` keeps.
        region: every node from the sources (left out) to the outputs, in graph order.
        axes: batch axis of the sources, of every region node and of each side input, as far as they have one.
        text: how many text tokens stand before and after the image's; (0, 0) where there is no text.
        refused: method to the reason why it is not possible here.
        projection_flops: floating point operations of the region's projections, for the whole batch.
    """

    path: str
    kind: str
    call: AttentionCall
    sources: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    region: tuple[fx.Node, ...]
    axes: Mapping[fx.Node, int]
    text: tuple[int, int]
    refused: Mapping[Method, str]
    projection_flops: int

    def __post_init__(self) -> None:
        assert self.sources and self.outputs, "a region has a beginning and an end"

    @property
    def shape(self) -> SiteShape:
        """Its sizes for the whole batch, as the cost model takes them."""
        *batch, heads, tokens, width = self.call.q_shape
        made = [value for value in map(tensor_of, self.outputs) if value is not None]
        return SiteShape(
            batch=math.prod(batch),
            heads=heads,
            tokens=tokens,
            text_tokens=sum(self.text),
            kv_tokens=self.call.kv_tokens,
            head_dim=width,
            projection_flops=self.projection_flops,
            output_numel=sum(value.numel() for value in made),
            itemsize=made[0].element_size(),
        )

    @property
    def methods(self) -> tuple[Method, ...]:
        """What this site can do at a step."""
        return tuple(method for method in Method if method not in self.refused)

    @property
    def output_axes(self) -> tuple[int, ...]:
        """Batch axis of each output.  Raises KeyError where the batch is not followed."""
        return tuple(self.axes[output] for output in self.outputs)

    def moved(self, nodes: Mapping[fx.Node, fx.Node]) -> AttentionSite:
        """The same site in a copy of its graph or of its segment; ``nodes`` maps old nodes to new ones."""
        return replace(
            self,
            call=self.call.moved(nodes),
            sources=tuple(nodes.get(node, node) for node in self.sources),
            outputs=tuple(nodes[node] for node in self.outputs),
            region=tuple(nodes[n] for n in self.region if n in nodes and nodes[n].op != "placeholder"),
            axes={nodes[node]: axis for node, axis in self.axes.items() if node in nodes},
        )


@dataclass(frozen=True, slots=True, eq=False)
class RejectedSite:
    """An attention that is left as it is, and why."""

    path: str
    node: fx.Node
    reason: str


@dataclass(frozen=True, slots=True)
class Origin:
    """What is known of a value that one graph of a denoiser hands to the next.

    Attributes:
        stream: whether it depends on the latents.
        tokens: which of its tokens are text, where a concatenation told.
    """

    stream: bool
    tokens: Tokens | None = None


@dataclass(frozen=True, slots=True)
class Attention:
    """Everything the search found in one graph.

    Attributes:
        sites: what a plan may change.
        rejected: what is left as it is.
        inputs: what the graph's inputs mean.
        results: what is known of each of its outputs.
    """

    sites: tuple[AttentionSite, ...]
    rejected: tuple[RejectedSite, ...]
    inputs: DenoiserInputs
    results: tuple[Origin, ...] = ()

    def __post_init__(self) -> None:
        paths = [site.path for site in self.sites]
        assert len(set(paths)) == len(paths), "site paths are unique"
