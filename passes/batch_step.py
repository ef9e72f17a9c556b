"""How one operation carries the batch, and what its rules are written with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from difa_fx.passes.graph_tools import shape_of, tensor_inputs, tensor_of


class LostBatchError(Exception):
    """The batch cannot be followed through a node; ``str()`` says why."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        self.node, self.reason = node, reason
        super().__init__(f"{node.name} ({node.target}): {reason}")


@dataclass(frozen=True, slots=True)
class Step:
    """How one node carries the batch.

    Attributes:
        axis: the batch axis of what the node yields (of each tensor, for a tuple).
        aligned: inputs that were not followed and must be halved, and along which axis.
        sizes: argument name to the literal sizes it needs when the batch is halved.
    """

    axis: int
    aligned: Mapping[fx.Node, int] = field(default_factory=dict)
    sizes: Mapping[str, Sequence[int] | int] = field(default_factory=dict)


Axes = Mapping[fx.Node, int]
"""The batch axis of each node that is followed."""

Rule = Callable[[fx.Node, Axes], Step]
"""How a node carries the batch, given the axes of its inputs; LostBatchError where it does not."""


class Rules(dict[Any, Rule]):
    """Rules by the operation that they are for."""

    def of(self, *targets: Any) -> Callable[[Rule], Rule]:
        """A decorator: the function is the rule of ``targets``."""

        def register(rule: Rule) -> Rule:
            self.update(dict.fromkeys(targets, rule))
            return rule

        return register


def leading(node: fx.Node, axes: Axes) -> tuple[fx.Node, int]:
    """The first input that is followed, and its axis."""
    source = next(s for s in node.all_input_nodes if s in axes)
    return source, axes[source]


def only_leading(node: fx.Node, axes: Axes) -> tuple[fx.Node, int]:
    """The first argument, when it alone is followed."""
    followed = [s for s in tensor_inputs(node) if s in axes]
    first = node.args[0]
    if followed != [first] or not isinstance(first, fx.Node):
        raise LostBatchError(node, "an input other than the first has the batch")
    return first, axes[first]


def positive(dim: int, ndim: int) -> int:
    """An axis counted from the front."""
    return dim + ndim if dim < 0 else dim


def align(node: fx.Node, sources: Sequence[fx.Node], axes: Axes, from_right: int, size: int) -> dict[fx.Node, int]:
    """Which of ``sources``, broadcast together, must be halved at ``from_right`` (1 = last axis)."""
    aligned: dict[fx.Node, int] = {}
    for source in sources:
        if tensor_of(source) is None:
            continue
        shape = shape_of(source)
        own = len(shape) - from_right
        if source in axes:
            if axes[source] != own:
                raise LostBatchError(node, f"{source.name} has the batch at another axis")
        elif own >= 0 and shape[own] != 1:
            if shape[own] != size:
                raise LostBatchError(node, f"{source.name} does not broadcast along the batch")
            aligned[source] = own
    return aligned
