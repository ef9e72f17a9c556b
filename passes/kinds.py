"""Kinds of operations: what of Dynamo's graph is traced once, however often it is called.

Operations are of one kind if target, constants, and the shape, strides, dtype and device of every tensor are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx

from difa_fx._torch import FakeTensor, FakeTensorMode, export_functional, fake_like, trace_functional
from difa_fx.passes.graph_tools import ancestors, output_values, placeholders

_CONSTANTS: Final = (bool, int, float, complex, str, type(None), type(...))
_TORCH_CONSTANTS: Final = (torch.dtype, torch.device, torch.layout, torch.memory_format)


class UnfitError(Exception):
    """The graph cannot be traced operation by operation."""


@dataclass(slots=True, eq=False)
class Value:
    """A tensor: as Dynamo or a trace knows it, and its node in the new graph once that is there."""

    fake: Tensor
    node: fx.Node | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    """One kind, traced: its placeholders, what it computes in order, and its result's nodes, flat."""

    inputs: Sequence[fx.Node]
    nodes: Sequence[fx.Node]
    result: Sequence[fx.Node]


@dataclass(slots=True)
class Kinds:
    """A torch-level graph that calls one operation of each kind on placeholders of its own.

    Attributes:
        graph: that graph.
        inputs: its placeholders, kind by kind.
        results: the operations' nodes.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    inputs: list[list[fx.Node]] = field(default_factory=list)
    results: list[fx.Node] = field(default_factory=list)
    _numbers: dict[Any, int] = field(default_factory=dict)

    def number(self, op: str, target: Any, arguments: tuple[Any, Any], read: Sequence[Value]) -> int:
        """The kind of an operation.

        Args:
            op: as fx has it.
            target: likewise.
            arguments: positional ones and keywords, with values of ``read`` where fx has nodes.
            read: what it reads, each once.

        Raises:
            UnfitError: an argument cannot be told from others.
        """
        position = {id(value): i for i, value in enumerate(read)}
        told = spelled(arguments, lambda value: position[id(value)])
        key = (op, target, told, tuple(described(value.fake) for value in read))
        kind = self._numbers.setdefault(key, len(self.results))
        if kind == len(self.results):
            made = [self.graph.placeholder(f"kind{kind}_{i}") for i in range(len(read))]
            for placeholder, value in zip(made, read, strict=True):
                placeholder.meta["val"] = value.fake
            args, kwargs = mapped(arguments, lambda value: made[position[id(value)]])
            self.inputs.append(made)
            self.results.append(self.graph.create_node(op, target, args, kwargs))
        return kind

    def traced(self, mode: FakeTensorMode) -> tuple[fx.GraphModule, list[Body]]:
        """Pre-dispatch ATen of each kind, and the module that holds its constants.

        Raises:
            UnfitError: a kind writes in place, or there is none.
        """
        module, inputs = self._ready(mode)
        traced = trace_functional(module, inputs) if inputs else None
        if traced is None:
            raise UnfitError
        return traced, self._bodies(traced.graph)

    def functionalized(self, mode: FakeTensorMode) -> tuple[fx.GraphModule, list[Body]]:
        """The same where each kind yields a copy of what it reads first, written to; copies are left out.

        Raises:
            UnfitError: a kind writes to what it reads.
        """
        module, inputs = self._ready(mode)
        exported, written = export_functional(module, inputs)
        read = placeholders(exported.graph)
        if written or len(read) != len(inputs):
            raise UnfitError
        for copied in list(exported.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)):
            if copied.args[0] in read:
                copied.replace_all_uses_with(copied.args[0])
        return exported, self._bodies(exported.graph)

    def _ready(self, mode: FakeTensorMode) -> tuple[fx.GraphModule, list[Tensor]]:
        self.graph.output(tuple(self.results))
        inputs = [fake_like(node.meta["val"], mode) for node in placeholders(self.graph)]
        return fx.GraphModule(torch.nn.Module(), self.graph), inputs

    def _bodies(self, graph: fx.Graph) -> list[Body]:
        order = {node: i for i, node in enumerate(graph.nodes)}
        inputs = iter(placeholders(graph))
        bodies = []
        for result, read in zip(output_values(graph), self.inputs, strict=True):
            nodes = list(flat(result, fx.Node))
            needed = sorted(ancestors(nodes), key=order.__getitem__)
            own = [next(inputs) for _ in read]
            bodies.append(Body(own, [node for node in needed if node.op != "placeholder"], nodes))
        return bodies


def described(value: Tensor) -> tuple[Any, ...]:
    """What of a tensor matters to a kind.

    Raises:
        UnfitError: it is more than that.
    """
    plain = type(value) is FakeTensor and value.layout is torch.strided and not value.is_conj() and not value.is_neg()
    if not plain or not all(type(size) is int for size in (*value.shape, *value.stride())):
        raise UnfitError
    return tuple(value.shape), value.stride(), value.dtype, value.device


def spelled(value: Any, name: Callable[[Value], int]) -> Any:
    """What tells arguments apart."""
    if isinstance(value, Value):
        return name(value)
    if isinstance(value, (list, tuple)):
        return tuple(spelled(item, name) for item in value)
    if isinstance(value, Mapping):
        return tuple((key, spelled(item, name)) for key, item in value.items())
    if isinstance(value, slice):
        return "slice", spelled((value.start, value.stop, value.step), name)
    if type(value) in _CONSTANTS or isinstance(value, _TORCH_CONSTANTS):
        return type(value).__name__, repr(value)
    raise UnfitError


def mapped(value: Any, change: Callable[[Any], Any], kind: type = Value) -> Any:
    """``value`` with every part of ``kind`` changed."""
    return fx.node.map_aggregate(value, lambda part: change(part) if isinstance(part, kind) else part)


def flat(value: Any, kind: type = Value) -> Iterator[Any]:
    """The parts of ``value`` that are of ``kind``, in order."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from flat(item, kind)
    elif isinstance(value, Mapping):
        yield from flat(list(value.values()), kind)
    elif isinstance(value, slice):
        yield from flat((value.start, value.stop, value.step), kind)
