"""What is known of one attention, however the model spells it.

Letters: B batch, H heads, N tokens, M key tokens, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import fx

from difa_fx.passes.graph_tools import shape_of

Layout = Literal["BHND", "BNHD", "BND"]
"""Order of the axes of q, k, v and the result; ``BND`` has heads and batch folded into one axis, or no heads."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One attention.

    Attributes:
        q: queries; k and v: keys and values, in ``layout``.
        result: the node that yields softmax(q k^T scale + mask) v.
        layout: order of the axes.
        keys_transposed: ``k`` has its last two axes swapped.
        values_transposed: ``v`` and the result have them swapped: channels come first.
        mask: the model's own, bool or additive, or None.
        filled: where ``mask`` is bool and scores are overwritten: its value there, and the score.
        scale: of the scores; None stands for 1 / sqrt(D).
        refused: why it cannot be cut to a window; empty when it can.
        refused_halves: why one half of its batch cannot be taken; empty when it can.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    result: fx.Node
    layout: Layout = "BHND"
    keys_transposed: bool = False
    values_transposed: bool = False
    mask: fx.Node | None = None
    filled: tuple[bool, float] | None = None
    scale: float | None = None
    refused: str = ""
    refused_halves: str = ""

    @property
    def node(self) -> fx.Node:
        """Where it stands in the graph."""
        return self.result

    @property
    def q_shape(self) -> tuple[int, ...]:
        """Shape of the queries as [B, H, N, D]; B is 1 where it is folded with H."""
        shape = shape_of(self.q)
        if self.layout == "BNHD":
            return shape[0], shape[2], shape[1], shape[3]
        return shape if len(shape) >= 4 else ((1,) * (4 - len(shape)) + shape)

    @property
    def heads(self) -> tuple[int, int]:
        """Number of query heads and of key heads."""
        axis = {"BHND": -3, "BNHD": -2, "BND": -3}[self.layout]
        return tuple(shape_of(n)[axis] if len(shape_of(n)) > 2 else 1 for n in (self.q, self.k))  # type: ignore[return-value]

    @property
    def kv_tokens(self) -> int:
        """Number of keys, M."""
        return shape_of(self.v)[1 if self.layout == "BNHD" else -1 if self.values_transposed else -2]

    @property
    def token_axis(self) -> int:
        """Axis of the tokens in the queries."""
        return 1 if self.layout == "BNHD" else len(shape_of(self.q)) - 2

    @property
    def result_axis(self) -> int:
        """Axis of the tokens in the result."""
        return self.token_axis + self.values_transposed

    def batch_axis(self, axis: int) -> int:
        """Where axis ``axis`` of the result stands in [B, H, N, D]."""
        if self.layout == "BNHD":
            return {1: 2, 2: 1}.get(axis, axis)
        return axis + 4 - max(len(shape_of(self.q)), 3) if len(shape_of(self.q)) < 4 else axis

    def moved(self, nodes: Any) -> AttentionCall:
        """The same call in a copy of its graph; ``nodes`` maps old nodes to new ones and may lack some."""
        return replace(
            self,
            q=nodes.get(self.q, self.q),
            k=nodes.get(self.k, self.k),
            v=nodes.get(self.v, self.v),
            mask=None if self.mask is None else nodes.get(self.mask, self.mask),
            result=nodes.get(self.result, self.result),
        )


@dataclass(frozen=True, slots=True, eq=False)
class UnreadCall:
    """What looks like attention and could not be read, and why."""

    node: fx.Node
    reason: str
